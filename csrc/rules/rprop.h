#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Rprop (Riedmiller & Braun 1993): a step size per element that grows while the gradient keeps its sign. Where the sign
// turns, the element rests for one step.
struct Rprop {
  static constexpr int kOperands = 4;  // param, grad, prev, step_size
  static constexpr unsigned kUsed = all_operands(4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double etaminus, etaplus, step_size_min, step_size_max;
  bool maximize;

  static constexpr List kLists[] = {params(), grads(), operand(2, "prevs", "prev"),
                                    operand(3, "step_sizes", "step_size"), steps()};
  static constexpr Field<Rprop> kFields[] = {
      number("etaminus", &Rprop::etaminus, "etas", 0), number("etaplus", &Rprop::etaplus, "etas", 1),
      number("step_size_min", &Rprop::step_size_min, "step_sizes", 0),
      number("step_size_max", &Rprop::step_size_max, "step_sizes", 1), flag("maximize", &Rprop::maximize)};

  OPTIM_EXT_RULE Rprop at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& prev, V& step_size) const {
    const V g = regularized(grad, param, maximize, V(0));
    const V agreement = g * prev;
    // Torch replaces one kind of sign after the other, and tells turned ones by what they have become. That matters for
    // rates no constructor lets through.
    const V turned_or_not = sign(agreement) < V(0) ? V(etaminus) : sign(agreement);
    const V grown_or_not = agreement > V(0) ? (V(etaplus) < V(0) ? V(etaminus) : V(etaplus)) : turned_or_not;
    const V factor = grown_or_not == V(0) ? V(1) : grown_or_not;
    const V grown = step_size * factor;
    const V at_least = grown < V(step_size_min) ? V(step_size_min) : grown;
    step_size = at_least > V(step_size_max) ? V(step_size_max) : at_least;
    prev = factor == V(etaminus) ? V(0) : g;
    param = param - sign(prev) * step_size;
  }
};

}  // namespace optim_ext::rules
