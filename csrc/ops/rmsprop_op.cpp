#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void rmsprop_(const Common& common, TensorList params, TensorList grads, TensorList square_avgs,
              TensorList momentum_buffers, TensorList grad_avgs, TensorList state_steps, const Tensor& lr, double alpha,
              double eps, double weight_decay, double momentum, bool centered, bool maximize) {
  const auto update = [&](auto rule) {
    rule.maximize = maximize;
    const CallSpec spec{common,
                        {{"params", params},
                         {"grads", grads},
                         {"square_avgs", square_avgs},
                         {"grad_avgs", grad_avgs},
                         {"momentum_buffers", momentum_buffers}},
                        state_steps};
    run<Driver>(rule, spec,
                {{"lr", rule.lr, lr},
                 {"alpha", rule.alpha, alpha},
                 {"eps", rule.eps, eps},
                 {"weight_decay", rule.weight_decay, weight_decay},
                 {"momentum", rule.momentum, momentum}});
  };
  if (centered) {
    momentum > 0.0 ? update(rules::RMSprop<true, true>{}) : update(rules::RMSprop<true, false>{});
  } else {
    momentum > 0.0 ? update(rules::RMSprop<false, true>{}) : update(rules::RMSprop<false, false>{});
  }
}

OPTIM_EXT_INSTANTIATE_OP(rmsprop_)

}  // namespace optim_ext::ops
