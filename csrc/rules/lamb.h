#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// How far a layer moves for a step of length one: as far as it is from the origin. Layers at the origin, and steps of
// no length, are left to the learning rate alone.
OPTIM_EXT_RULE double trust_ratio(double param_norm, double step_norm) {
  return param_norm > 0.0 && step_norm > 0.0 ? param_norm / step_norm : 1.0;
}

// LAMB (You et al. 2020, algorithm 2): Adam's step with weight decay, then the parameter along it by its own norm. This
// is the step and the moments behind it. The first rule below makes steps for their norms alone, the second one makes
// them again and goes along them: what both read is less than the memory that steps would be kept in.
struct LambStep {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  double per_bias_correction1, per_bias_correction2_sqrt;  // filled in by at_step

  static constexpr List kLists[] = {params(), grads(), operand(2, "exp_avgs", "exp_avg"),
                                    operand(3, "exp_avg_sqs", "exp_avg_sq"), steps()};
  static constexpr Field<LambStep> kFields[] = {
      tensor_or(number("lr", &LambStep::lr)),          number("beta1", &LambStep::beta1, "betas", 0),
      number("beta2", &LambStep::beta2, "betas", 1),   number("eps", &LambStep::eps),
      number("weight_decay", &LambStep::weight_decay), flag("maximize", &LambStep::maximize)};
  static constexpr Derived<LambStep> kDerived[] = {
      finite("the bias correction", &LambStep::per_bias_correction1, &LambStep::beta1),
      real("the root of the bias correction", &LambStep::per_bias_correction2_sqrt, &LambStep::beta2)};

  OPTIM_EXT_RULE LambStep at_step(double count) const {
    LambStep step = *this;
    step.per_bias_correction1 = 1.0 / (1.0 - power(beta1, count));
    step.per_bias_correction2_sqrt = 1.0 / root(1.0 - power(beta2, count));
    return step;
  }

  template <class V>
  OPTIM_EXT_RULE V operator()(V param, V grad, V& exp_avg, V& exp_avg_sq) const {
    const V g = regularized(grad, param, maximize, V(0));
    exp_avg = V(beta1) * exp_avg + V(1.0 - beta1) * g;
    exp_avg_sq = V(beta2) * exp_avg_sq + V(1.0 - beta2) * g * g;
    const V denom = root(exp_avg_sq) * V(per_bias_correction2_sqrt) + V(eps);
    const V adam = exp_avg * V(per_bias_correction1) / denom;
    return V(weight_decay) != V(0) ? adam + V(weight_decay) * param : adam;
  }
};

struct LambDirection {
  static constexpr int kOperands = 5;  // param, grad, exp_avg, exp_avg_sq, step
  static constexpr unsigned kUsed = all_operands(5);
  static constexpr unsigned kUpdates = operand_bit(4);

  LambStep step_of;

  OPTIM_EXT_RULE LambDirection at_step(double count) const { return {step_of.at_step(count)}; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V param, V grad, V exp_avg, V exp_avg_sq, V& step) const {
    step = step_of(param, grad, exp_avg, exp_avg_sq);
  }
};

struct LambUpdate {
  static constexpr int kOperands = 4;  // param, grad, exp_avg, exp_avg_sq
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);
  static constexpr int kScalars = 2;  // norm of param, norm of its step
  static constexpr bool kMeasured = true;

  LambStep step_of;
  double step_size;  // filled in by at_step

  OPTIM_EXT_RULE LambUpdate at_step(double count, Scalar* norms) const {
    return {step_of.at_step(count), step_of.lr * trust_ratio(norms[0].value, norms[1].value)};
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& exp_avg, V& exp_avg_sq) const {
    const V step = step_of(param, grad, exp_avg, exp_avg_sq);
    param = param - V(step_size) * step;
  }
};

}  // namespace optim_ext::rules
