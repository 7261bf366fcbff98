#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// NAdam: Adam with Nesterov momentum (Dozat 2016); decoupled weight decay as in AdamW.
struct NAdam {
  static constexpr int kOperands = 4;  // param, grad, exp_avg, exp_avg_sq
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);
  static constexpr int kScalars = 1;  // mu_product

  double lr, beta1, beta2, eps, weight_decay, momentum_decay;
  bool maximize, decoupled_weight_decay;
  double grad_step_size, momentum_step_size, bias_correction2_sqrt, l2, decay;  // filled in by at_step

  static constexpr List kLists[] = {params(),
                                    grads(),
                                    operand(2, "exp_avgs", "exp_avg"),
                                    operand(3, "exp_avg_sqs", "exp_avg_sq"),
                                    scalar(0, "mu_products", "mu_product"),
                                    steps()};
  static constexpr Field<NAdam> kFields[] = {apart_from_state(tensor_or(number("lr", &NAdam::lr))),
                                             number("beta1", &NAdam::beta1, "betas", 0),
                                             number("beta2", &NAdam::beta2, "betas", 1),
                                             number("eps", &NAdam::eps),
                                             number("weight_decay", &NAdam::weight_decay),
                                             number("momentum_decay", &NAdam::momentum_decay),
                                             flag("maximize", &NAdam::maximize),
                                             flag("decoupled_weight_decay", &NAdam::decoupled_weight_decay)};
  static constexpr Derived<NAdam> kDerived[] = {
      finite("the step size of the gradient", &NAdam::grad_step_size, &NAdam::lr, &NAdam::beta1,
             &NAdam::momentum_decay),
      finite("the step size of the momentum", &NAdam::momentum_step_size, &NAdam::lr, &NAdam::beta1,
             &NAdam::momentum_decay),
      real("the root of the bias correction", &NAdam::bias_correction2_sqrt, &NAdam::beta2)};

  OPTIM_EXT_RULE NAdam at_step(double step, Scalar* scalars) const {
    NAdam rule = *this;
    Scalar& mu_product = scalars[0];
    const double mu = momentum_at(step), mu_next = momentum_at(step + 1.0);
    mu_product.value = rounded(mu_product.value * rounded(mu, mu_product.is_double), mu_product.is_double);
    rule.grad_step_size = lr * (1.0 - mu) / (1.0 - mu_product.value);
    rule.momentum_step_size = lr * mu_next / (1.0 - mu_product.value * mu_next);
    rule.bias_correction2_sqrt = root(1.0 - power(beta2, step));
    rule.l2 = decoupled_weight_decay ? 0.0 : weight_decay;
    rule.decay = decoupled_weight_decay ? shrinkage(lr, weight_decay) : 1.0;
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& exp_avg, V& exp_avg_sq) const {
    const V g = regularized(grad, param, maximize, V(l2));
    const V decayed = V(decay) * param;
    exp_avg = lerp(exp_avg, g, V(1.0 - beta1));
    exp_avg_sq = V(beta2) * exp_avg_sq + V(1.0 - beta2) * g * g;
    const V denom = root(exp_avg_sq) / V(bias_correction2_sqrt) + V(eps);
    param = decayed - V(grad_step_size) * (g / denom) - V(momentum_step_size) * (exp_avg / denom);
  }

 private:
  OPTIM_EXT_RULE double momentum_at(double step) const {
    return beta1 * (1.0 - 0.5 * real_power(0.96, step * momentum_decay));
  }
};

}  // namespace optim_ext::rules
