#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// RMSprop (Hinton, lecture 6e of "Neural Networks for Machine Learning", 2012); centered as in Graves 2013.
template <bool kCentered, bool kMomentum>
struct RMSprop {
  static constexpr int kOperands = 5;  // param, grad, square_avg, grad_avg, momentum_buffer
  static constexpr unsigned kUsed = all_operands(3) | operand_bit_if(kCentered, 3) | operand_bit_if(kMomentum, 4);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double lr, alpha, eps, weight_decay, momentum;
  bool centered, maximize;

  static constexpr List kLists[] = {params(),
                                    grads(),
                                    operand(2, "square_avgs", "square_avg"),
                                    operand(4, "momentum_buffers", "momentum_buffer"),
                                    operand(3, "grad_avgs", "grad_avg"),
                                    steps()};
  static constexpr Field<RMSprop> kFields[] = {
      tensor_or(number("lr", &RMSprop::lr)),  number("alpha", &RMSprop::alpha),
      number("eps", &RMSprop::eps),           number("weight_decay", &RMSprop::weight_decay),
      number("momentum", &RMSprop::momentum), flag("centered", &RMSprop::centered),
      flag("maximize", &RMSprop::maximize)};

  OPTIM_EXT_RULE RMSprop at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& square_avg, V& grad_avg, V& momentum_buffer) const {
    const V g = regularized(grad, param, maximize, V(weight_decay));
    square_avg = V(alpha) * square_avg + V(1.0 - alpha) * g * g;
    V variance = square_avg;
    if constexpr (kCentered) {
      grad_avg = lerp(grad_avg, g, V(1.0 - alpha));
      variance = square_avg - finite(grad_avg * grad_avg);
    }
    V update = g / (root(variance) + V(eps));
    if constexpr (kMomentum) update = momentum_buffer = V(momentum) * momentum_buffer + update;
    param = param - V(lr) * update;
  }
};

}  // namespace optim_ext::rules
