#pragma once

#include "rule.h"

namespace optim_ext::rules {

// Rprop (Riedmiller & Braun 1993): a step size per element that grows while the gradient keeps its sign. Where the sign
// turns, the element rests for one step.
struct Rprop {
  static constexpr int kOperands = 4;  // param, grad, prev, step_size
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double etaminus, etaplus, step_size_min, step_size_max;
  bool maximize;

  OPTIM_EXT_RULE Rprop at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& prev, V& step_size) const {
    const V g = regularized(grad, param, maximize, V(0));
    const V agreement = g * prev;
    const V turned_or_none = agreement < V(0) ? V(etaminus) : V(1);
    const V factor = agreement > V(0) ? V(etaplus) : turned_or_none;
    const V grown = step_size * factor;
    const V at_least = grown < V(step_size_min) ? V(step_size_min) : grown;
    step_size = at_least > V(step_size_max) ? V(step_size_max) : at_least;
    prev = agreement < V(0) ? V(0) : g;
    param = param - sign(prev) * step_size;
  }
};

}  // namespace optim_ext::rules
