// The kernels of a rule that were compiled while the process runs (one_rule.h), as a program of the driver.
#pragma once

#include "launch.h"

namespace optim_ext::cuda {

struct LoadedRule {
  device::Kernel sweep[2][2];  // of steps that do not average, and that do, which may be null; in float, in double
  device::Kernel advance_scalars;
  bool stores_scalars;
};

// Loads a module for the current device. `averaging`: that of steps that average, or null.
inline device::Status load_rule(const void* image, const void* averaging, bool stores_scalars, LoadedRule& rule) {
  rule = {{}, nullptr, stores_scalars};
  device::Module module = nullptr;
  device::Status error = device::load(image, module);
  const auto find = [&](const char* name, device::Kernel& kernel) {
    if (error == device::kSuccess) error = device::find(module, name, kernel);
  };
  find("optim_ext_sweep_float", rule.sweep[0][0]);
  find("optim_ext_sweep_double", rule.sweep[0][1]);
  find("optim_ext_advance_scalars", rule.advance_scalars);
  if (averaging == nullptr || error != device::kSuccess) return error;
  error = device::load(averaging, module);
  find("optim_ext_averaging_sweep_float", rule.sweep[1][0]);
  find("optim_ext_averaging_sweep_double", rule.sweep[1][1]);
  return error;
}

template <bool kInDouble>
device::Status launch_loaded(const void* of, const Packed& args, int64_t chunks, device::Stream stream) {
  const LoadedRule& rule = *static_cast<const LoadedRule*>(of);
  const auto launch = [&](device::Kernel kernel, int64_t blocks) {
    return blocks == 0 ? device::kSuccess : device::launch(kernel, {blocks}, kThreads, stream, &args);
  };
  const device::Status error = launch(rule.sweep[args.batch.averaged][kInDouble], chunks);
  if (!rule.stores_scalars || error != device::kSuccess) return error;
  return launch(rule.advance_scalars, (args.batch.count + kThreads - 1) / kThreads);
}

inline Program program_of(const LoadedRule& rule, const RuleShape& shape) {
  return {shape, rule.stores_scalars, {&launch_loaded<false>, &launch_loaded<true>}, &rule};
}

}  // namespace optim_ext::cuda
