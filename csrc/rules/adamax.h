#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Adamax: Adam under the infinity norm (Kingma & Ba 2015, section 7).
struct Adamax {
  static constexpr int kOperands = 4;  // param, grad, exp_avg, exp_inf
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  double step_size;  // filled in by at_step

  static constexpr List kLists[] = {params(), grads(), operand(2, "exp_avgs", "exp_avg"),
                                    operand(3, "exp_infs", "exp_inf"), steps()};
  static constexpr Field<Adamax> kFields[] = {
      tensor_or(number("lr", &Adamax::lr)),          number("beta1", &Adamax::beta1, "betas", 0),
      number("beta2", &Adamax::beta2, "betas", 1),   number("eps", &Adamax::eps),
      number("weight_decay", &Adamax::weight_decay), flag("maximize", &Adamax::maximize)};
  static constexpr Derived<Adamax> kDerived[] = {
      finite("the step size", &Adamax::step_size, &Adamax::lr, &Adamax::beta1)};

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
