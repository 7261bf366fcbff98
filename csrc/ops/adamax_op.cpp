#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void adamax_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_infs,
             TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
             bool maximize) {
  rules::Adamax rule{};
  rule.maximize = maximize;
  const CallSpec spec{
      common, {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_infs", exp_infs}}, state_steps};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr},
               {"beta1", rule.beta1, beta1},
               {"beta2", rule.beta2, beta2},
               {"eps", rule.eps, eps},
               {"weight_decay", rule.weight_decay, weight_decay}});
}

OPTIM_EXT_INSTANTIATE_OP(adamax_)

}  // namespace optim_ext::ops
