#pragma once

#include "rule.h"

namespace optim_ext::rules {

// How far a layer moves for a step of length one: as far as it is from the origin. Layers at the origin, and steps of
// no length, are left to the learning rate alone.
OPTIM_EXT_RULE double trust_ratio(double param_norm, double step_norm) {
  return param_norm > 0.0 && step_norm > 0.0 ? param_norm / step_norm : 1.0;
}

// LAMB (You et al. 2020, algorithm 2): Adam's step with weight decay, then the parameter along it by its own norm.
struct LambMoments {
  static constexpr int kOperands = 5;  // param, grad, exp_avg, exp_avg_sq, update (written only)
  static constexpr unsigned kUsed = all_operands(5);
  static constexpr unsigned kUpdates = all_operands(5) & ~all_operands(2);

  double beta1, beta2, eps, weight_decay;
  bool maximize;
  double bias_correction1, bias_correction2_sqrt;  // filled in by at_step

  OPTIM_EXT_RULE LambMoments at_step(double step) const {
    LambMoments rule = *this;
    rule.bias_correction1 = 1.0 - power(beta1, step);
    rule.bias_correction2_sqrt = root(1.0 - power(beta2, step));
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V param, V grad, V& exp_avg, V& exp_avg_sq, V& update) const {
    const V g = regularized(grad, param, maximize, V(0));
    exp_avg = V(beta1) * exp_avg + V(1.0 - beta1) * g;
    exp_avg_sq = V(beta2) * exp_avg_sq + V(1.0 - beta2) * g * g;
    const V denom = root(exp_avg_sq) / V(bias_correction2_sqrt) + V(eps);
    const V adam = exp_avg / V(bias_correction1) / denom;
    update = V(weight_decay) != V(0) ? adam + V(weight_decay) * param : adam;
  }
};

struct LambUpdate {
  static constexpr int kOperands = 2;  // param, update
  static constexpr unsigned kUsed = all_operands(2);
  static constexpr unsigned kUpdates = operand_bit(0);
  static constexpr int kScalars = 2;  // norm of param, norm of update; both only read

  double lr;
  double step_size;  // filled in by at_step

  OPTIM_EXT_RULE LambUpdate at_step(double, Scalar* norms) const {
    LambUpdate rule = *this;
    rule.step_size = lr * trust_ratio(norms[0].value, norms[1].value);
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V update) const {
    param = param - V(step_size) * update;
  }
};

}  // namespace optim_ext::rules
