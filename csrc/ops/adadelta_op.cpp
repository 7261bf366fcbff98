#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void adadelta_(const Common& common, TensorList params, TensorList grads, TensorList square_avgs, TensorList acc_deltas,
               TensorList state_steps, const Tensor& lr, double rho, double eps, double weight_decay, bool maximize) {
  rules::Adadelta rule{};
  rule.maximize = maximize;
  const CallSpec spec{common,
                      {{"params", params}, {"grads", grads}, {"square_avgs", square_avgs}, {"acc_deltas", acc_deltas}},
                      state_steps};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr},
               {"rho", rule.rho, rho},
               {"eps", rule.eps, eps},
               {"weight_decay", rule.weight_decay, weight_decay}});
}

OPTIM_EXT_INSTANTIATE_OP(adadelta_)

}  // namespace optim_ext::ops
