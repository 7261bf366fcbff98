#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// LARS (You, Gitman & Ginsburg 2017): momentum SGD whose step is, layer by layer, a fixed fraction of the parameter's
// norm. As in torch.optim.SGD the learning rate stays out of the momentum buffer.
struct Lars {
  static constexpr int kOperands = 3;  // param, grad, momentum_buffer
  static constexpr unsigned kUsed = all_operands(3);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);
  static constexpr int kScalars = 2;  // norm of param, norm of grad
  static constexpr bool kMeasured = true;

  double lr, momentum, weight_decay, trust_coefficient, eps;
  bool nesterov, maximize;
  double local_rate, look_ahead;  // filled in by at_step

  static constexpr List kLists[] = {params(), grads(), operand(2, "momentum_buffers", "momentum_buffer")};
  static constexpr Field<Lars> kFields[] = {tensor_or(number("lr", &Lars::lr)),
                                            number("momentum", &Lars::momentum),
                                            number("weight_decay", &Lars::weight_decay),
                                            number("trust_coefficient", &Lars::trust_coefficient),
                                            number("eps", &Lars::eps),
                                            flag("nesterov", &Lars::nesterov),
                                            flag("maximize", &Lars::maximize)};

  OPTIM_EXT_RULE Lars at_step(double, Scalar* norms) const {
    Lars rule = *this;
    const double param_norm = norms[0].value, grad_norm = norms[1].value;
    rule.local_rate = param_norm > 0.0 && grad_norm > 0.0
                          ? trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps)
                          : 1.0;
    rule.look_ahead = nesterov ? 1.0 : 0.0;
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& momentum_buffer) const {
    const V g = V(local_rate) * regularized(grad, param, maximize, V(weight_decay));
    momentum_buffer = V(momentum) * momentum_buffer + g;
    const V ahead = g + V(momentum) * momentum_buffer;
    param = param - V(lr) * (V(look_ahead) != V(0) ? ahead : momentum_buffer);
  }
};

}  // namespace optim_ext::rules
