// What is asked of a step besides its rule and hyper-parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace optim_ext::ops {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

// One struct on the whole way from Python's step to a call, whose kernels take its values as a Pass
// (kernels/operand.h). Every tensor has one element but for the averages.
struct StepControls {
  OptionalTensor grad_scale = std::nullopt;      // GradScaler's: gradients are divided by it, in place
  OptionalTensor found_inf = std::nullopt;       // one: nothing is written
  OptionalTensor grad_factor = std::nullopt;     // multiplies the gradients as the rule sees them, not in memory
  TensorList averages = {};                      // of the parameters, to be brought up to date; or none
  OptionalTensor average_weight = std::nullopt;  // of the updated parameter in its average
  // What lies beside parameters and state (kernels/operand.h), for all parameters as many kinds of it; or none.
  TensorList companions = {};

  // For a sweep that does not read the gradients, as an earlier one has done.
  StepControls without_grads() const {
    return {std::nullopt, found_inf, std::nullopt, averages, average_weight, companions};
  }
  // For a sweep that reads them again once they have been unscaled in place.
  StepControls once_unscaled() const {
    return {std::nullopt, found_inf, grad_factor, averages, average_weight, companions};
  }
  // For a sweep that does not finish the parameters.
  StepControls without_average() const { return {grad_scale, found_inf, grad_factor, {}, std::nullopt, companions}; }
  // For a part of the parameters; the list must outlive the controls.
  StepControls with_averages(TensorList of_part) const {
    StepControls controls = *this;
    controls.averages = of_part;
    return controls;
  }
  StepControls with_companions(TensorList of_part) const {
    StepControls controls = *this;
    controls.companions = of_part;
    return controls;
  }
};

}  // namespace optim_ext::ops
