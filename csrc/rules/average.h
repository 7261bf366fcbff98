#pragma once

#include "rule.h"

namespace optim_ext::rules {

// A running average of parameters: the mean of n of them with weight 1 / n (SWA, Izmailov et al. 2018), the exponential
// moving average with weight 1 - decay (Polyak & Juditsky 1992). Weight 1 copies, also where the average is infinite or
// NaN.
struct Average {
  static constexpr int kOperands = 2;  // average, param
  static constexpr unsigned kUsed = all_operands(2);
  static constexpr unsigned kUpdates = operand_bit(0);

  double weight;

  OPTIM_EXT_RULE Average at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& average, V param) const {
    const V moved = lerp(average, param, V(weight));
    average = V(weight) == V(1) ? param : moved;
  }
};

}  // namespace optim_ext::rules
