#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void sgd_(const Common& common, TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool is_first_step) {
  const auto update = [&](auto rule) {
    rule.nesterov = nesterov;
    rule.maximize = maximize;
    rule.is_first_step = is_first_step;
    const CallSpec spec{.common = common,
                        .operands = {{"params", params}, {"grads", grads}, {"momentum_buffers", momentum_buffers}},
                        .takes_sparse = momentum == 0.0};
    run<Driver>(rule, spec,
                {{"lr", rule.lr, lr},
                 {"momentum", rule.momentum, momentum},
                 {"dampening", rule.dampening, dampening},
                 {"weight_decay", rule.weight_decay, weight_decay}});
  };
  momentum != 0.0 ? update(rules::Sgd<true>{}) : update(rules::Sgd<false>{});
}

OPTIM_EXT_INSTANTIATE_OP(sgd_)

}  // namespace optim_ext::ops
