#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Lion (Chen et al. 2023): the sign of an interpolated momentum, with decoupled weight decay.
struct Lion {
  static constexpr int kOperands = 3;  // param, grad, exp_avg
  static constexpr unsigned kUsed = all_operands(3);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, beta1, beta2, weight_decay;
  bool maximize;

  static constexpr List kLists[] = {params(), grads(), operand(2, "exp_avgs", "exp_avg")};
  static constexpr Field<Lion> kFields[] = {
      tensor_or(number("lr", &Lion::lr)), number("beta1", &Lion::beta1, "betas", 0),
      number("beta2", &Lion::beta2, "betas", 1), number("weight_decay", &Lion::weight_decay),
      flag("maximize", &Lion::maximize)};

  OPTIM_EXT_RULE Lion at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& exp_avg) const {
    const V g = regularized(grad, param, maximize, V(0));
    const V update = sign(V(beta1) * exp_avg + V(1.0 - beta1) * g);
    exp_avg = V(beta2) * exp_avg + V(1.0 - beta2) * g;
    param = V(shrinkage(lr, weight_decay)) * param - V(lr) * update;
  }
};

}  // namespace optim_ext::rules
