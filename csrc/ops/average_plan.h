// The host path of an averaged model: from two modules to calls of average_ without a Python loop.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>

namespace optim_ext::ops {

// One call of average_ for averages on one device and the parameters they follow, which are copied there first if they
// are elsewhere.
void run_average(at::TensorList averages, at::TensorList params, const at::Tensor& weight,
                 const std::optional<at::Tensor>& found_inf, bool check_only);

// Adds the class AveragePlan to the module.
void bind_average_plan(pybind11::module_& m);

}  // namespace optim_ext::ops
