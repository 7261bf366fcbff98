#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018) and, with decoupled weight decay, AdamW (Loshchilov & Hutter
// 2019).
template <bool kAmsgrad>
struct Adam {
  static constexpr int kOperands = 5;  // param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr unsigned kUsed = all_operands(4) | operand_bit_if(kAmsgrad, 4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, beta1, beta2, eps, weight_decay;
  bool amsgrad, maximize, decoupled_weight_decay;
  double step_size, per_bias_correction2_sqrt, l2, decay;  // filled in by at_step

  static constexpr List kLists[] = {params(),
                                    grads(),
                                    operand(2, "exp_avgs", "exp_avg"),
                                    operand(3, "exp_avg_sqs", "exp_avg_sq"),
                                    operand(4, "max_exp_avg_sqs", "max_exp_avg_sq"),
                                    steps()};
  static constexpr Field<Adam> kFields[] = {tensor_or(number("lr", &Adam::lr)),
                                            tensor_or(number("beta1", &Adam::beta1, "betas", 0)),
                                            tensor_or(number("beta2", &Adam::beta2, "betas", 1)),
                                            number("weight_decay", &Adam::weight_decay),
                                            number("eps", &Adam::eps),
                                            flag("amsgrad", &Adam::amsgrad),
                                            flag("maximize", &Adam::maximize),
                                            flag("decoupled_weight_decay", &Adam::decoupled_weight_decay)};
  static constexpr Derived<Adam> kDerived[] = {
      finite("the step size", &Adam::step_size, &Adam::lr, &Adam::beta1),
      real("the root of the bias correction", &Adam::per_bias_correction2_sqrt, &Adam::beta2)};

  OPTIM_EXT_RULE Adam at_step(double step) const {
    Adam rule = *this;
    rule.step_size = lr / (1.0 - power(beta1, step));
    rule.per_bias_correction2_sqrt = 1.0 / root(1.0 - power(beta2, step));
    rule.l2 = decoupled_weight_decay ? 0.0 : weight_decay;
    rule.decay = decoupled_weight_decay ? shrinkage(lr, weight_decay) : 1.0;
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& exp_avg, V& exp_avg_sq, V& max_exp_avg_sq) const {
    const V g = regularized(grad, param, maximize, V(l2));
    const V decayed = V(decay) * param;
    exp_avg = lerp(exp_avg, g, V(1.0 - beta1));
    exp_avg_sq = V(beta2) * exp_avg_sq + V(1.0 - beta2) * g * g;
    V second_moment = exp_avg_sq;
    if constexpr (kAmsgrad) second_moment = max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq);
    // Times the reciprocal: where memory is not the limit (bf16, small tensors) divisions are.
    const V denom = root(second_moment) * V(per_bias_correction2_sqrt) + V(eps);
    param = decayed - V(step_size) * (exp_avg / denom);
  }
};

}  // namespace optim_ext::rules
