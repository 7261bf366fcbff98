#pragma once

#include "rule.h"

namespace optim_ext::rules {

// Brings values into [-limit, limit], NaN staying NaN. Reads the list it writes; what it reads is scaled by the call's
// grad_factor, so with an infinite limit it is a multiplication.
struct Clip {
  static constexpr int kOperands = 2;  // the tensors, and the same as gradients
  static constexpr unsigned kUsed = all_operands(2);
  static constexpr unsigned kUpdates = operand_bit(0);

  double limit;

  OPTIM_EXT_RULE Clip at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad) const {
    const V raised = grad < V(-limit) ? V(-limit) : grad;
    param = raised > V(limit) ? V(limit) : raised;
  }
};

}  // namespace optim_ext::rules
