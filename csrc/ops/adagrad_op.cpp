#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void adagrad_(const Common& common, TensorList params, TensorList grads, TensorList state_sums, TensorList state_steps,
              const Tensor& lr, double lr_decay, double weight_decay, double eps, bool maximize) {
  rules::Adagrad rule{};
  rule.maximize = maximize;
  const CallSpec spec{.common = common,
                      .operands = {{"params", params}, {"grads", grads}, {"state_sums", state_sums}},
                      .state_steps = state_steps,
                      .takes_sparse = weight_decay == 0.0};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr},
               {"lr_decay", rule.lr_decay, lr_decay},
               {"weight_decay", rule.weight_decay, weight_decay},
               {"eps", rule.eps, eps}});
}

OPTIM_EXT_INSTANTIATE_OP(adagrad_)

}  // namespace optim_ext::ops
