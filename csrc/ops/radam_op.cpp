#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void radam_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
            TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
            bool maximize, bool decoupled_weight_decay) {
  rules::RAdam rule{};
  rule.maximize = maximize;
  rule.decoupled_weight_decay = decoupled_weight_decay;
  const CallSpec spec{common,
                      {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
                      state_steps};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr},
               {"beta1", rule.beta1, beta1},
               {"beta2", rule.beta2, beta2},
               {"eps", rule.eps, eps},
               {"weight_decay", rule.weight_decay, weight_decay}});
}

OPTIM_EXT_INSTANTIATE_OP(radam_)

}  // namespace optim_ext::ops
