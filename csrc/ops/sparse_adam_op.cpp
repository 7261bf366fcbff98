#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void sparse_adam_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs,
                  TensorList exp_avg_sqs, TensorList state_steps, const Tensor& lr, double beta1, double beta2,
                  double eps, bool maximize) {
  rules::SparseAdam rule{};
  rule.maximize = maximize;
  const CallSpec spec{
      .common = common,
      .operands = {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
      .state_steps = state_steps,
      .takes_sparse = true};
  run<Driver>(
      rule, spec,
      {{"lr", rule.lr, lr}, {"beta1", rule.beta1, beta1}, {"beta2", rule.beta2, beta2}, {"eps", rule.eps, eps}});
}

OPTIM_EXT_INSTANTIATE_OP(sparse_adam_)

}  // namespace optim_ext::ops
