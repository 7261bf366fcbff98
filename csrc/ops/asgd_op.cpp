#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void asgd_(const Common& common, TensorList params, TensorList grads, TensorList mus, TensorList axs, TensorList etas,
           TensorList state_steps, const Tensor& lr, double lambd, double alpha, double t0, double weight_decay,
           bool maximize) {
  rules::ASGD rule{};
  rule.maximize = maximize;
  rule.counts_in_double = !state_steps.empty() && state_steps[0].scalar_type() == at::kDouble;
  const CallSpec spec{
      common, {{"params", params}, {"grads", grads}, {"axs", axs}}, state_steps, {{"etas", etas}, {"mus", mus}}};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr},
               {"lambd", rule.lambd, lambd},
               {"alpha", rule.alpha, alpha},
               {"t0", rule.t0, t0},
               {"weight_decay", rule.weight_decay, weight_decay}});
}

OPTIM_EXT_INSTANTIATE_OP(asgd_)

}  // namespace optim_ext::ops
