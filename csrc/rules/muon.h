#pragma once

#include "rule.h"

namespace optim_ext::rules {

// Muon (Jordan et al. 2024) without its matrix products: the momentum that is to be orthogonalized, and the step along
// the result.
struct MuonMomentum {
  static constexpr int kOperands = 3;  // update (written only), grad, momentum_buffer
  static constexpr unsigned kUsed = all_operands(3);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double momentum;
  bool nesterov;
  double share;  // filled in by at_step: of the momentum in the update, the rest being the gradient

  OPTIM_EXT_RULE MuonMomentum at_step(double) const {
    MuonMomentum rule = *this;
    rule.share = nesterov ? momentum : 1.0;
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& update, V grad, V& momentum_buffer) const {
    momentum_buffer = lerp(momentum_buffer, grad, V(1.0 - momentum));
    update = lerp(grad, momentum_buffer, V(share));
  }
};

struct MuonUpdate {
  static constexpr int kOperands = 2;  // param, orthogonal update
  static constexpr unsigned kUsed = all_operands(2);
  static constexpr unsigned kUpdates = operand_bit(0);

  double lr, weight_decay, lr_ratio;

  OPTIM_EXT_RULE MuonUpdate at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V update) const {
    param = V(1.0 - lr * weight_decay) * param - V(lr * lr_ratio) * update;
  }
};

}  // namespace optim_ext::rules
