#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Stochastic gradient descent, with Polyak or Nesterov momentum in the form torch.optim.SGD uses.
template <bool kMomentum>
struct Sgd {
  static constexpr int kOperands = 3;  // param, grad, momentum_buffer
  static constexpr unsigned kUsed = all_operands(2) | operand_bit_if(kMomentum, 2);
  static constexpr unsigned kUpdates = operand_bit(0) | operand_bit_if(kMomentum, 2);

  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool is_first_step;  // the buffer starts as the gradient itself, without dampening
  // Filled in by at_step; the last two are the shares of the old buffer and of the gradient in the new one.
  double lookahead, kept, taken;

  static constexpr List kLists[] = {params(), grads(), operand(2, "momentum_buffers", "momentum_buffer")};
  static constexpr Field<Sgd> kFields[] = {
      tensor_or(number("lr", &Sgd::lr)),         number("momentum", &Sgd::momentum),
      number("dampening", &Sgd::dampening),      number("weight_decay", &Sgd::weight_decay),
      flag("nesterov", &Sgd::nesterov),          flag("maximize", &Sgd::maximize),
      flag("is_first_step", &Sgd::is_first_step)};

  OPTIM_EXT_RULE Sgd at_step(double) const {
    Sgd rule = *this;
    rule.lookahead = nesterov ? 1.0 : 0.0;
    rule.kept = is_first_step ? 0.0 : momentum;
    rule.taken = is_first_step ? 1.0 : 1.0 - dampening;
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& momentum_buffer) const {
    const V g = regularized(grad, param, maximize, V(weight_decay));
    V update = g;
    if constexpr (kMomentum) {
      momentum_buffer = V(kept) * momentum_buffer + V(taken) * g;
      update = V(lookahead) != V(0) ? g + V(momentum) * momentum_buffer : momentum_buffer;
    }
    param = param - V(lr) * update;
  }
};

}  // namespace optim_ext::rules
