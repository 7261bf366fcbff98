#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// RAdam (Liu et al. 2020): Adam that adapts only once the variance of its second moment is known well enough.
struct RAdam {
  static constexpr int kOperands = 4;  // param, grad, exp_avg, exp_avg_sq
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, decoupled_weight_decay;
  double step_size, is_rectified, l2, decay;  // filled in by at_step; is_rectified: 1, 0, or -inf without a variance

  static constexpr List kLists[] = {params(), grads(), operand(2, "exp_avgs", "exp_avg"),
                                    operand(3, "exp_avg_sqs", "exp_avg_sq"), steps()};
  static constexpr Field<RAdam> kFields[] = {tensor_or(number("lr", &RAdam::lr)),
                                             number("beta1", &RAdam::beta1, "betas", 0),
                                             number("beta2", &RAdam::beta2, "betas", 1),
                                             number("eps", &RAdam::eps),
                                             number("weight_decay", &RAdam::weight_decay),
                                             flag("maximize", &RAdam::maximize),
                                             flag("decoupled_weight_decay", &RAdam::decoupled_weight_decay)};
  static constexpr Derived<RAdam> kDerived[] = {
      finite("the rectification", &RAdam::is_rectified, &RAdam::beta2),
      real("the step size", &RAdam::step_size, &RAdam::lr, &RAdam::beta1, &RAdam::beta2)};

  OPTIM_EXT_RULE RAdam at_step(double step) const {
    RAdam rule = *this;
    const double beta2_power = power(beta2, step), bias_correction2 = 1.0 - beta2_power;
    const double rho_inf = 2.0 / (1.0 - beta2) - 1.0;
    const double rho = rho_inf - 2.0 * step * beta2_power / bias_correction2;
    const double rectification = root((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho));
    rule.is_rectified = rho > 5.0 ? 1.0 : rho - rho == 0.0 ? 0.0 : -__builtin_inf();
    rule.step_size = lr / (1.0 - power(beta1, step)) * (rho > 5.0 ? root(bias_correction2) * rectification : 1.0);
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
    const V denom = V(is_rectified) > V(0) ? root(exp_avg_sq) + V(eps) : V(1);
    param = decayed - V(step_size) * (exp_avg / denom);
  }
};

}  // namespace optim_ext::rules
