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

const OpenKernels* load_kernels(const OpenVariant& variant, int gpu, const std::vector<std::string>& images) {
  static std::mutex mutex;
  static std::deque<OpenKernels> all;
  TORCH_CHECK_VALUE(gpu >= 0 && gpu < OpenVariant::kMostGpus, "optim_ext: rules run on the first ",
                    OpenVariant::kMostGpus, " GPUs of a process, found cuda:", gpu);
  TORCH_CHECK_VALUE(images.size() == size_t{cuda::kKindsOfKernels}, "optim_ext: ", images.size(), " images, expected ",
                    cuda::kKindsOfKernels);
  const RuleCode& code = variant.code;
  const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(gpu)));
  cuda::LoadedRule rule{{}, nullptr, nullptr, code.scalars > 0};
  for (int kind = 0; kind < cuda::kKindsOfKernels; ++kind) {
    const std::string& image = images[static_cast<size_t>(kind)];
    if (!image.empty()) CudaPlace::check(cuda::load_kernels(image.data(), kind, rule));
  }
  const std::lock_guard lock(mutex);
  OpenKernels& kernels = all.emplace_back(OpenKernels{rule, {}});
  kernels.program = cuda::program_of(kernels.rule, {code.bytes(), code.used, code.numbers()});
  return &kernels;
}

void check_kernels(const OpenKernels* kernels, const OpenVariant& variant, const Work& call) {
  const auto check = [&](int kind, const char* what_for, bool averaging, const char* how) {
    TORCH_CHECK_VALUE(kernels != nullptr && kernels->rule.sweep[kind] != nullptr,
                      "optim_ext::rule_: this process has no kernels of rule ", variant.name, " for ", call.device,
                      " that ", what_for, averaging ? " and average" : "",
                      "; have its class compiled with compile(\"cuda\"", how, ") there first");
  };
  const bool averages = std::any_of(call.bundles.begin(), call.bundles.end(),
                                    [](const Bundle& bundle) { return bundle.average != nullptr; });
  for (const Bundle& bundle : call.bundles) {
    for (const bool averaging : {false, averages}) {
      if (bundle.companions != nullptr) {
        check(cuda::kind_of_kept_kernel(averaging), "take what lies beside parameters and state", averaging,
              ", param_precision=\"auto\"");
      } else {
        check(cuda::kind_of_kernel(averaging, bundle.in_double),
              bundle.in_double ? "compute in double" : "compute in float", averaging, "");
      }
    }
  }
  TORCH_CHECK_VALUE(call.device_hypers.size() <= static_cast<size_t>(cuda::kMaxLiveHypers),
                    "optim_ext::rule_: ", call.device_hypers.size(), " hyper-parameters are on ", call.device,
                    ", and kernels take ", cuda::kMaxLiveHypers, " at most from there");
}

void run_kernels(const OpenKernels& kernels, const OpenRule& rule, const Work& call) {
  CudaDriver::run(kernels.program, &rule, call);
}

}  // namespace optim_ext::ops
