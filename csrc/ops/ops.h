// The ops, as library.cpp registers them. Each is a template over the driver of the device it runs on; the definitions
// are instantiated in <name>_op.cpp for every driver there is.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace optim_ext::ops {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

template <class Driver>
void sgd_(TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& lr, double momentum,
          double dampening, double weight_decay, bool nesterov, bool maximize, bool is_first_step,
          const OptionalTensor& grad_scale, const OptionalTensor& found_inf);

template <class Driver, bool kAdamW = false>
void adam_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs,
           TensorList state_steps, const Tensor& lr, const Tensor& beta1, const Tensor& beta2, double weight_decay,
           double eps, bool amsgrad, bool maximize, bool decoupled_weight_decay, const OptionalTensor& grad_scale,
           const OptionalTensor& found_inf);

// adam_ under the name by which AdamW's messages and profiles know it.
template <class Driver>
inline constexpr auto adamw_ = &adam_<Driver, true>;

template <class Driver>
void rmsprop_(TensorList params, TensorList grads, TensorList square_avgs, TensorList momentum_buffers,
              TensorList grad_avgs, TensorList state_steps, const Tensor& lr, double alpha, double eps,
              double weight_decay, double momentum, bool centered, bool maximize, const OptionalTensor& grad_scale,
              const OptionalTensor& found_inf);

template <class Driver>
void adagrad_(TensorList params, TensorList grads, TensorList state_sums, TensorList state_steps, const Tensor& lr,
              double lr_decay, double weight_decay, double eps, bool maximize, const OptionalTensor& grad_scale,
              const OptionalTensor& found_inf);

}  // namespace optim_ext::ops
