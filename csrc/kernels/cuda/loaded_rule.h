// The kernels of a rule that were compiled while the process runs (one_rule.h), as a program of the driver.
#pragma once

#include "launch.h"

namespace optim_ext::cuda {

// By whether steps average, and whether they compute in double; then those for what is kept in another way than the
// rule sees it.
constexpr int kKindsOfKernels = 6;
constexpr const char* kNamesOfKernels[kKindsOfKernels] = {
    "optim_ext_sweep_float",           "optim_ext_sweep_double",
    "optim_ext_averaging_sweep_float", "optim_ext_averaging_sweep_double",
    "optim_ext_kept_sweep_float",      "optim_ext_kept_averaging_sweep_float"};
constexpr int kind_of_kernel(bool averages, bool in_double) { return 2 * averages + in_double; }
constexpr int kind_of_kept_kernel(bool averages) { return 4 + averages; }

// Null: it was not compiled.
struct LoadedRule {
  device::Kernel sweep[kKindsOfKernels];
  device::Kernel advance_scalars, advance_kept_scalars;
  bool stores_scalars;
};

// Loads the module of one kind for the current device.
inline device::Status load_kernels(const void* image, int kind, LoadedRule& rule) {
  device::Module module = nullptr;
  device::Status error = device::load(image, module);
  if (error == device::kSuccess) error = device::find(module, kNamesOfKernels[kind], rule.sweep[kind]);
  if (error != device::kSuccess) return error;
  return kind >= kind_of_kept_kernel(false)
             ? device::find(module, "optim_ext_advance_kept_scalars", rule.advance_kept_scalars)
             : device::find(module, "optim_ext_advance_scalars", rule.advance_scalars);
}

template <bool kInDouble>
device::Status launch_loaded(const void* of, const Packed& args, int64_t chunks, device::Stream stream) {
  const LoadedRule& rule = *static_cast<const LoadedRule*>(of);
  const bool averages = args.batch.averaged;
  const int kind = args.batch.kept ? kind_of_kept_kernel(averages) : kind_of_kernel(averages, kInDouble);
  const device::Kernel advance = args.batch.kept ? rule.advance_kept_scalars : rule.advance_scalars;
  const auto launch = [&](device::Kernel kernel, int64_t blocks) {
    return blocks == 0 ? device::kSuccess : device::launch(kernel, {blocks}, kThreads, stream, &args);
  };
  const device::Status error = launch(rule.sweep[kind], chunks);
  if (!rule.stores_scalars || error != device::kSuccess) return error;
  return launch(advance, (args.batch.count + kThreads - 1) / kThreads);
}

inline Program program_of(const LoadedRule& rule, const RuleShape& shape) {
  return {shape, rule.stores_scalars, {&launch_loaded<false>, &launch_loaded<true>}, &rule};
}

}  // namespace optim_ext::cuda
