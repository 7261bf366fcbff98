#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void adagrad_(TensorList params, TensorList grads, TensorList state_sums, TensorList state_steps, const Tensor& lr,
              double lr_decay, double weight_decay, double eps, bool maximize, const OptionalTensor& grad_scale,
              const OptionalTensor& found_inf) {
  rules::Adagrad rule{};
  rule.maximize = maximize;
  const CallSpec spec{"adagrad_", {{"params", params}, {"grads", grads}, {"state_sums", state_sums}},
                      true,       state_steps,
                      grad_scale, found_inf};
  run<Driver>(rule, spec,
              {{"lr", rule.lr, lr},
               {"lr_decay", rule.lr_decay, lr_decay},
               {"weight_decay", rule.weight_decay, weight_decay},
               {"eps", rule.eps, eps}});
}

OPTIM_EXT_INSTANTIATE_OP(adagrad_)

}  // namespace optim_ext::ops
