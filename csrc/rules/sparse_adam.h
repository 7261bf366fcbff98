#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Adam (Kingma & Ba 2015) in torch.optim.SparseAdam's form, for the rows a sparse gradient holds: eps is added to the
// root of the uncorrected second moment.
struct SparseAdam {
  static constexpr int kOperands = 4;  // param, grad, exp_avg, exp_avg_sq
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, beta1, beta2, eps;
  bool maximize;
  double step_size;  // filled in by at_step

  static constexpr List kLists[] = {params(), grads(), operand(2, "exp_avgs", "exp_avg"),
                                    operand(3, "exp_avg_sqs", "exp_avg_sq"), steps()};
  static constexpr Field<SparseAdam> kFields[] = {
      tensor_or(number("lr", &SparseAdam::lr)), number("beta1", &SparseAdam::beta1, "betas", 0),
      number("beta2", &SparseAdam::beta2, "betas", 1), number("eps", &SparseAdam::eps),
      flag("maximize", &SparseAdam::maximize)};
  static constexpr Derived<SparseAdam> kDerived[] = {
      finite("the step size", &SparseAdam::step_size, &SparseAdam::lr, &SparseAdam::beta1, &SparseAdam::beta2)};

  OPTIM_EXT_RULE SparseAdam at_step(double step) const {
    SparseAdam rule = *this;
    rule.step_size = lr * root(1.0 - power(beta2, step)) / (1.0 - power(beta1, step));
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& exp_avg, V& exp_avg_sq) const {
    const V g = regularized(grad, param, maximize, V(0));
    exp_avg = exp_avg + (g - exp_avg) * V(1.0 - beta1);
    exp_avg_sq = exp_avg_sq + (g * g - exp_avg_sq) * V(1.0 - beta2);
    param = param - V(step_size) * (exp_avg / (root(exp_avg_sq) + V(eps)));
  }
};

}  // namespace optim_ext::rules
