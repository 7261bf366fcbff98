// The ops that do not step, as library.cpp registers them. Each is a template over the driver of the device it runs on;
// the definitions are instantiated in <name>_op.cpp for every driver there is. (Those that step: step_op.h.)
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "in_turns.h"

namespace optim_ext::ops {

// Brings running averages up to date. found_inf of one: leaves them as they are.
template <class Driver>
void average_(TensorList averages, TensorList params, const Tensor& weight, const OptionalTensor& found_inf);

// Multiplies tensors by `factor` and brings what comes out into [-limit, limit].
template <class Driver>
void clip_(TensorList tensors, std::optional<double> limit, const OptionalTensor& factor);

// The norm of all gradients together, and what a step is to make of it: (norm, grad_factor, found_inf), each with one
// element. The last two are what an optimizer's op takes under these names. `skips` counts the steps to be skipped.
template <class Driver>
std::tuple<Tensor, Tensor, Tensor> grad_norm(TensorList grads, double norm_type, std::optional<double> max_norm,
                                             bool skip_nonfinite, std::optional<double> skip_above,
                                             const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                                             const OptionalTensor& skips);

// The norm of each tensor, in double.
template <class Driver>
Tensor norms(TensorList tensors, double norm_type);

// The root mean square of each tensor, in double: of parameters with `companions` what the two are together.
template <class Driver>
Tensor root_mean_squares(TensorList tensors, TensorList companions);

// How many elements of each tensor are not finite; the two parts of a complex number count on their own.
template <class Driver>
Tensor count_nonfinite(TensorList tensors);

}  // namespace optim_ext::ops
