#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void nadam_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
            TensorList mu_products, TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps,
            double weight_decay, double momentum_decay, bool maximize, bool decoupled_weight_decay) {
  rules::NAdam rule{};
  rule.maximize = maximize;
  rule.decoupled_weight_decay = decoupled_weight_decay;
  const CallSpec spec{common,
                      {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
                      state_steps,
                      {{"mu_products", mu_products}}};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr, Hyper::kNotInScalars},
               {"beta1", rule.beta1, beta1},
               {"beta2", rule.beta2, beta2},
               {"eps", rule.eps, eps},
               {"weight_decay", rule.weight_decay, weight_decay},
               {"momentum_decay", rule.momentum_decay, momentum_decay}});
}

OPTIM_EXT_INSTANTIATE_OP(nadam_)

}  // namespace optim_ext::ops
