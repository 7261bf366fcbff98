#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Adadelta (Zeiler 2012), with torch's learning rate in front of the update.
struct Adadelta {
  static constexpr int kOperands = 4;  // param, grad, square_avg, acc_delta
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, rho, eps, weight_decay;
  bool maximize;

  static constexpr List kLists[] = {params(), grads(), operand(2, "square_avgs", "square_avg"),
                                    operand(3, "acc_deltas", "acc_delta"), steps()};
  static constexpr Field<Adadelta> kFields[] = {
      tensor_or(number("lr", &Adadelta::lr)), number("rho", &Adadelta::rho), number("eps", &Adadelta::eps),
      number("weight_decay", &Adadelta::weight_decay), flag("maximize", &Adadelta::maximize)};

  OPTIM_EXT_RULE Adadelta at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& square_avg, V& acc_delta) const {
    const V g = regularized(grad, param, maximize, V(weight_decay));
    square_avg = V(rho) * square_avg + V(1.0 - rho) * g * g;
    const V delta = root(acc_delta + V(eps)) / root(square_avg + V(eps)) * g;
    acc_delta = V(rho) * acc_delta + V(1.0 - rho) * delta * delta;
    param = param - V(lr) * delta;
  }
};

}  // namespace optim_ext::rules
