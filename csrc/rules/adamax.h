#pragma once

#include "rule.h"

namespace optim_ext::rules {

// Adamax: Adam under the infinity norm (Kingma & Ba 2015, section 7).
struct Adamax {
  static constexpr int kOperands = 4;  // param, grad, exp_avg, exp_inf
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  double step_size;  // filled in by at_step

  OPTIM_EXT_RULE Adamax at_step(double step) const {
    Adamax rule = *this;
    rule.step_size = lr / (1.0 - power(beta1, step));
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& exp_avg, V& exp_inf) const {
    const V g = regularized(grad, param, maximize, V(weight_decay));
    exp_avg = lerp(exp_avg, g, V(1.0 - beta1));
    exp_inf = larger(V(beta2) * exp_inf, magnitude(g) + V(eps));
    param = param - V(step_size) * (exp_avg / exp_inf);
  }
};

}  // namespace optim_ext::rules
