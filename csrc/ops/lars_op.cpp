#include <ATen/core/LegacyTypeDispatch.h>

#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void lars_(const Common& common, TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& lr,
           double momentum, double weight_decay, double trust_coefficient, double eps, bool nesterov, bool maximize) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  rules::Lars rule{};
  rule.nesterov = nesterov;
  rule.maximize = maximize;
  const std::initializer_list<List> operands = {
      {"params", params}, {"grads", grads}, {"momentum_buffers", momentum_buffers}};
  {
    const CallSpec spec{.common = common, .operands = operands};
    const Call checked(spec, rules::Lars::kOperands, rules::Lars::kUsed, rules::Lars::kUpdates);
    if (checked.empty() || checked.skip) return;
  }
  Tensor grad_norms = norms<Driver>(grads, 2.0);  // of the gradients as the rule will see them
  if (common.grad_scale) grad_norms = grad_norms.div(*common.grad_scale);
  if (common.grad_factor) grad_norms = grad_norms.mul(*common.grad_factor);
  const std::vector<Tensor> by_param = norms<Driver>(params, 2.0).unbind(), by_grad = grad_norms.unbind();
  run<Driver>(rule,
              {.common = common, .operands = operands, .scalars = {{"param_norms", by_param}, {"grad_norms", by_grad}}},
              {{"lr", rule.lr, lr},
               {"momentum", rule.momentum, momentum},
               {"weight_decay", rule.weight_decay, weight_decay},
               {"trust_coefficient", rule.trust_coefficient, trust_coefficient},
               {"eps", rule.eps, eps}});
}

OPTIM_EXT_INSTANTIATE_OP(lars_)

}  // namespace optim_ext::ops
