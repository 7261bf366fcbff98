#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Adagrad (Duchi, Hazan & Singer 2011), with torch's learning-rate decay.
struct Adagrad {
  static constexpr int kOperands = 3;  // param, grad, sum
  static constexpr unsigned kUsed = all_operands(3);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, lr_decay, weight_decay, eps;
  bool maximize;
  double decayed_lr;  // filled in by at_step

  static constexpr List kLists[] = {params(), grads(), operand(2, "state_sums", "sum"), steps()};
  static constexpr Field<Adagrad> kFields[] = {tensor_or(number("lr", &Adagrad::lr)),
                                               number("lr_decay", &Adagrad::lr_decay),
                                               number("weight_decay", &Adagrad::weight_decay),
                                               number("eps", &Adagrad::eps), flag("maximize", &Adagrad::maximize)};
  static constexpr Derived<Adagrad> kDerived[] = {
      finite("the decayed rate", &Adagrad::decayed_lr, &Adagrad::lr, &Adagrad::lr_decay)};

  OPTIM_EXT_RULE Adagrad at_step(double step) const {
    Adagrad rule = *this;
    rule.decayed_lr = lr / (1.0 + (step - 1.0) * lr_decay);
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& sum) const {
    const V g = regularized(grad, param, maximize, V(weight_decay));
    sum = sum + g * g;
    param = param - V(decayed_lr) * (g / (root(sum) + V(eps)));
  }
};

}  // namespace optim_ext::rules
