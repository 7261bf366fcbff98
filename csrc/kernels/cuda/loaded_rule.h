// The kernels of a rule that were compiled while the process runs (one_rule.h), as a program of the driver.
#pragma once

#include "launch.h"

namespace optim_ext::cuda {

// By whether steps average, and whether they compute in double.
constexpr int kKindsOfKernels = 4;
constexpr const char* kNamesOfKernels[kKindsOfKernels] = {"optim_ext_sweep_float", "optim_ext_sweep_double",
                                                          "optim_ext_averaging_sweep_float",
                                                          "optim_ext_averaging_sweep_double"};
constexpr int kind_of_kernel(bool averages, bool in_double) { return 2 * averages + in_double; }

struct LoadedRule {
  device::Kernel sweep[kKindsOfKernels];  // null: it was not compiled
  device::Kernel advance_scalars;
  bool stores_scalars;
};

// Loads the module of one kind for the current device.
inline device::Status load_kernels(const void* image, int kind, LoadedRule& rule) {
  device::Module module = nullptr;
  device::Status error = device::load(image, module);
  if (error == device::kSuccess) error = device::find(module, kNamesOfKernels[kind], rule.sweep[kind]);
  if (error == device::kSuccess) error = device::find(module, "optim_ext_advance_scalars", rule.advance_scalars);
  return error;
}

template <bool kInDouble>
device::Status launch_loaded(const void* of, const Packed& args, int64_t chunks, device::Stream stream) {
  if (args.batch.kept) return device::kInvalidGrid;
  const LoadedRule& rule = *static_cast<const LoadedRule*>(of);
  const auto launch = [&](device::Kernel kernel, int64_t blocks) {
    return blocks == 0 ? device::kSuccess : device::launch(kernel, {blocks}, kThreads, stream, &args);
  };
  const device::Status error = launch(rule.sweep[kind_of_kernel(args.batch.averaged, kInDouble)], chunks);
  if (!rule.stores_scalars || error != device::kSuccess) return error;
  return launch(rule.advance_scalars, (args.batch.count + kThreads - 1) / kThreads);
}

inline Program program_of(const LoadedRule& rule, const RuleShape& shape) {
  return {shape, rule.stores_scalars, {&launch_loaded<false>, &launch_loaded<true>}, &rule};
}

}  // namespace optim_ext::cuda
