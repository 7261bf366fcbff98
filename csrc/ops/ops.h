// The ops, as library.cpp registers them. Each is a template over the driver of the device it runs on; the definitions
// are instantiated in <name>_op.cpp for every driver there is.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "turns.h"

namespace optim_ext::ops {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
inline const OptionalTensor kNone;

// A name as a template argument.
template <size_t kLength>
struct OpName {
  char text[kLength];
  constexpr OpName(const char (&name)[kLength]) { std::copy_n(name, kLength, text); }
};

template <class... Others>
TensorList first(TensorList list, const Others&...) {
  return list;
}

// The function the dispatcher calls for an op: its own arguments, then those every op has. One body may serve several
// ops.
template <OpName kName, auto kBody>
struct Op;
template <OpName kName, class... Args, void (*kBody)(const Common&, Args...)>
struct Op<kName, kBody> {
  static void call(Args... args, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                   const OptionalTensor& grad_factor, TensorList averages, const OptionalTensor& average_weight) {
    in_turns({kName.text, grad_scale, found_inf, grad_factor, averages, average_weight}, first(args...),
             [&](const Common& common, const Members& of) { kBody(common, of(args)...); });
  }
};
// An op that is not a step has its own arguments only.
template <OpName kName, class... Args, void (*kBody)(const char*, Args...)>
struct Op<kName, kBody> {
  static void call(Args... args) {
    in_turns({kName.text, kNone, kNone, kNone, {}, kNone}, {},
             [&](const Common&, const Members& of) { kBody(kName.text, of(args)...); });
  }
};

template <class Driver>
void sgd_(const Common& common, TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool is_first_step);

template <class Driver>
void adam_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
           TensorList max_exp_avg_sqs, TensorList state_steps, const Tensor& lr, const Tensor& beta1,
           const Tensor& beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
           bool decoupled_weight_decay);

template <class Driver>
void rmsprop_(const Common& common, TensorList params, TensorList grads, TensorList square_avgs,
              TensorList momentum_buffers, TensorList grad_avgs, TensorList state_steps, const Tensor& lr, double alpha,
              double eps, double weight_decay, double momentum, bool centered, bool maximize);

template <class Driver>
void adagrad_(const Common& common, TensorList params, TensorList grads, TensorList state_sums, TensorList state_steps,
              const Tensor& lr, double lr_decay, double weight_decay, double eps, bool maximize);

template <class Driver>
void adadelta_(const Common& common, TensorList params, TensorList grads, TensorList square_avgs, TensorList acc_deltas,
               TensorList state_steps, const Tensor& lr, double rho, double eps, double weight_decay, bool maximize);

template <class Driver>
void adamax_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_infs,
             TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
             bool maximize);

template <class Driver>
void asgd_(const Common& common, TensorList params, TensorList grads, TensorList mus, TensorList axs, TensorList etas,
           TensorList state_steps, const Tensor& lr, double lambd, double alpha, double t0, double weight_decay,
           bool maximize);

template <class Driver>
void lion_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, const Tensor& lr,
           double beta1, double beta2, double weight_decay, bool maximize);

template <class Driver>
void nadam_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
            TensorList mu_products, TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps,
            double weight_decay, double momentum_decay, bool maximize, bool decoupled_weight_decay);

template <class Driver>
void radam_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
            TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
            bool maximize, bool decoupled_weight_decay);

template <class Driver>
void rprop_(const Common& common, TensorList params, TensorList grads, TensorList prevs, TensorList step_sizes,
            TensorList state_steps, double etaminus, double etaplus, double step_size_min, double step_size_max,
            bool maximize);

template <class Driver>
void sparse_adam_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs,
                  TensorList exp_avg_sqs, TensorList state_steps, const Tensor& lr, double beta1, double beta2,
                  double eps, bool maximize);

// Not a step: brings running averages up to date. found_inf of one: leaves them as they are.
template <class Driver>
void average_(const char* op, TensorList averages, TensorList params, const Tensor& weight,
              const OptionalTensor& found_inf);

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

// The root mean square of each tensor, in double.
template <class Driver>
Tensor root_mean_squares(TensorList tensors);

// How many elements of each tensor are not finite; the two parts of a complex number count on their own.
template <class Driver>
Tensor count_nonfinite(TensorList tensors);

template <class Driver>
void muon_(const Common& common, TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& lr,
           double weight_decay, double momentum, bool nesterov, double ns_a, double ns_b, double ns_c, double eps,
           int64_t ns_steps, bool match_rms_adamw);

template <class Driver>
void adafactor_(const Common& common, TensorList params, TensorList grads, TensorList row_vars, TensorList col_vars,
                TensorList variances, TensorList state_steps, const Tensor& lr, double beta2_decay, double eps1,
                double eps2, double d, double weight_decay, bool maximize);

template <class Driver>
void lamb_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
           TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
           bool maximize);

template <class Driver>
void lars_(const Common& common, TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& lr,
           double momentum, double weight_decay, double trust_coefficient, double eps, bool nesterov, bool maximize);

}  // namespace optim_ext::ops
