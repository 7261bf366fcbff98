// The kernels of rules that are not known when this library is built.
#include <algorithm>
#include <deque>
#include <mutex>

#include "../kernels/cuda/loaded_rule.h"
#include "driver_cuda.h"
#include "rule_op.h"

namespace optim_ext::ops {

struct OpenKernels {
  cuda::LoadedRule rule;
  cuda::Program program;
};

const OpenKernels* load_kernels(const OpenVariant& variant, int gpu, const std::string& image,
                                const std::string& averaging) {
  static std::mutex mutex;
  static std::deque<OpenKernels> all;
  TORCH_CHECK_VALUE(gpu >= 0 && gpu < OpenVariant::kMostGpus, "optim_ext: rules run on the first ",
                    OpenVariant::kMostGpus, " GPUs of a process, found cuda:", gpu);
  const RuleCode& code = variant.code;
  const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(gpu)));
  cuda::LoadedRule rule;
  CudaPlace::check(
      cuda::load_rule(image.data(), averaging.empty() ? nullptr : averaging.data(), code.scalars > 0, rule));
  const std::lock_guard lock(mutex);
  OpenKernels& kernels = all.emplace_back(OpenKernels{rule, {}});
  kernels.program = cuda::program_of(kernels.rule, {code.bytes(), code.used, code.numbers()});
  return &kernels;
}

void check_kernels(const OpenKernels* kernels, const OpenVariant& variant, const Work& call) {
  TORCH_CHECK_VALUE(kernels != nullptr, "optim_ext::rule_: this process has no kernels of rule ", variant.name, " for ",
                    call.device, "; have its class compiled with compile(\"cuda\") there first");
  const bool averages = std::any_of(call.bundles.begin(), call.bundles.end(),
                                    [](const Bundle& bundle) { return bundle.average != nullptr; });
  TORCH_CHECK_VALUE(!averages || kernels->rule.sweep[1][0] != nullptr, "optim_ext::rule_: this process has no kernels ",
                    "of rule ", variant.name, " that average on ", call.device);
  TORCH_CHECK_VALUE(call.device_hypers.size() <= static_cast<size_t>(cuda::kMaxLiveHypers),
                    "optim_ext::rule_: ", call.device_hypers.size(), " hyper-parameters are on ", call.device,
                    ", and kernels take ", cuda::kMaxLiveHypers, " at most from there");
}

void run_kernels(const OpenKernels& kernels, const OpenRule& rule, const Work& call) {
  CudaDriver::run(kernels.program, &rule, call);
}

}  // namespace optim_ext::ops
