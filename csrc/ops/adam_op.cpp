#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver, bool kAdamW>
void adam_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList max_exp_avg_sqs,
           TensorList state_steps, const Tensor& lr, const Tensor& beta1, const Tensor& beta2, double weight_decay,
           double eps, bool amsgrad, bool maximize, bool decoupled_weight_decay, const OptionalTensor& grad_scale,
           const OptionalTensor& found_inf) {
  const auto update = [&](auto rule) {
    rule.maximize = maximize;
    rule.decoupled_weight_decay = decoupled_weight_decay;
    const CallSpec spec{kAdamW ? "adamw_" : "adam_",
                        {{"params", params},
                         {"grads", grads},
                         {"exp_avgs", exp_avgs},
                         {"exp_avg_sqs", exp_avg_sqs},
                         {"max_exp_avg_sqs", max_exp_avg_sqs}},
                        true,
                        state_steps,
                        grad_scale,
                        found_inf};
    run<Driver>(rule, spec,
                {{"lr", rule.lr, lr},
                 {"beta1", rule.beta1, beta1},
                 {"beta2", rule.beta2, beta2},
                 {"eps", rule.eps, eps},
                 {"weight_decay", rule.weight_decay, weight_decay}});
  };
  amsgrad ? update(rules::Adam<true>{}) : update(rules::Adam<false>{});
}

OPTIM_EXT_INSTANTIATE_OP(adam_)
OPTIM_EXT_INSTANTIATE_OP(adam_, true)

}  // namespace optim_ext::ops
