// Running averages from C++, on whatever device they are.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace optim_ext::ops {

// The same value on another device. Nothing waits, unless it goes to the CPU, where it may be read at once.
std::optional<at::Tensor> moved_to(at::Device device, const std::optional<at::Tensor>& value);

// The weight of an average as an op on `device` takes it: a number the host knows stays on the host.
at::Tensor weight_for(at::Device device, const at::Tensor& weight);

// One call of average_ for averages on one device and the parameters they follow, which are copied there first if they
// are elsewhere.
void run_average(at::TensorList averages, at::TensorList params, const at::Tensor& weight,
                 const std::optional<at::Tensor>& found_inf, bool check_only);

}  // namespace optim_ext::ops
