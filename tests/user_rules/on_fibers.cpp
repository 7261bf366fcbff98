// The kernels of a rule as NVRTC gets them (RULE_UNIT), on the fibers of the double without torch: a library for
// Python, whose memory one step works on.
#include RULE_UNIT
OPTIM_EXT_EXPORT_SWEEP(optim_ext_sweep_double, optim_ext::written::Rule, double, false)
OPTIM_EXT_EXPORT_SWEEP(optim_ext_averaging_sweep_float, optim_ext::written::Rule, float, true)
OPTIM_EXT_EXPORT_SWEEP(optim_ext_averaging_sweep_double, optim_ext::written::Rule, double, true)

#include <cstring>

#include "place.h"

namespace optim_ext {

namespace {

using Rule = written::Rule;

template <bool kInDouble>
device::Status sweep(const void*, const cuda::Packed& args, int64_t chunks, device::Stream stream) {
  auto* kernel = kInDouble ? &optim_ext_sweep_double : &optim_ext_sweep_float;
  if (args.batch.averaged) kernel = kInDouble ? &optim_ext_averaging_sweep_double : &optim_ext_averaging_sweep_float;
  const auto& typed = args.as<Rule>();
  const device::Status error = cuda::launch_blocks(kernel, typed, chunks, stream);
  if (!rules::kStoresScalars<Rule> || error != device::kSuccess) return error;
  return cuda::launch_blocks(&optim_ext_advance_scalars, typed, 1, stream);
}

}  // namespace

// What one tensor of a step is; null where it has none.
struct Given {
  void* data[kMaxOperands];
  double* scalars[kMaxScalars];
  void* average;
  int64_t numel;
  uint8_t storage;  // of all operands
};

}  // namespace optim_ext

// `numbers`: the rule's, behind the pointer that the interpreter has. `step`: of all tensors, on the device. Returns
// how many launches there were.
extern "C" long step_on_fibers(const optim_ext::Given* given, int64_t count, const double* numbers,
                               int64_t number_count, double* step, double average_weight, const float* grad_scale,
                               const float* found_inf, uint64_t seed) {
  using namespace optim_ext;
  device::set_seed(seed);
  DoubleCall call;
  call.steps_on_device = false;
  call.pass.average_weight = average_weight;
  call.pass.on_device.grad_scale = grad_scale;
  call.pass.on_device.found_inf = found_inf;
  std::vector<Bundle> averages(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const Given& from = given[i];
    Bundle bundle{};
    bundle.numel = from.numel;
    bundle.device_step = step;
    bundle.step_storage = Storage::f64;
    for (int k = 0; k < kMaxOperands; ++k) {
      bundle.data[k] = from.data[k];
      bundle.storage[k] = static_cast<Storage>(from.storage);
    }
    bundle.in_double = bundle.storage[0] == Storage::f64;
    for (int k = 0; k < kMaxScalars; ++k) bundle.scalars[k] = {0.0, from.scalars[k], Storage::f64};
    if (from.average) {
      Bundle& average = averages[static_cast<size_t>(i)] = bundle;
      average.data[0] = from.average;
      average.data[1] = from.data[0];
      bundle.average = &average;
    }
    call.bundles.push_back(bundle);
  }
  alignas(8) unsigned char rule[sizeof(Rule)] = {};
  std::memcpy(rule + sizeof(void*), numbers, sizeof(double) * static_cast<size_t>(number_count));
  const cuda::Program program{
      cuda::shape_of<Rule>(), rules::kStoresScalars<Rule>, {&sweep<false>, &sweep<true>}, nullptr};
  const DoublePlace place;
  const long before = DoublePlace::launches;
  cuda::Driver(place).run(program, rule, call);
  return DoublePlace::launches - before;
}
