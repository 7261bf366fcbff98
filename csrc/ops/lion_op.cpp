#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void lion_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, const Tensor& lr,
           double beta1, double beta2, double weight_decay, bool maximize) {
  rules::Lion rule{};
  rule.maximize = maximize;
  const CallSpec spec{common, {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}}};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr},
               {"beta1", rule.beta1, beta1},
               {"beta2", rule.beta2, beta2},
               {"weight_decay", rule.weight_decay, weight_decay}});
}

OPTIM_EXT_INSTANTIATE_OP(lion_)

}  // namespace optim_ext::ops
