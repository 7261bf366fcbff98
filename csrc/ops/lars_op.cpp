#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

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
  const CallSpec spec{.common = common,
                      .operands = {{"params", params}, {"grads", grads}, {"momentum_buffers", momentum_buffers}}};
  Call call(spec, rules::Lars::kOperands, rules::Lars::kUsed, rules::Lars::kUpdates);
  call.set({{"lr", rule.lr, lr},
            {"momentum", rule.momentum, momentum},
            {"weight_decay", rule.weight_decay, weight_decay},
            {"trust_coefficient", rule.trust_coefficient, trust_coefficient},
            {"eps", rule.eps, eps}},
           &rule, sizeof rule);
  if (CheckOnly::active() || call.empty() || call.skip) return;

  const auto count = static_cast<int64_t>(params.size());
  const auto doubles = at::TensorOptions().device(call.device).dtype(at::kDouble);
  const Tensor param_norms = at::empty({count}, doubles), grad_norms = at::empty({count}, doubles);
  Driver::template reduce_each<rules::L2Norm>(call, param_norms.mutable_data_ptr<double>());
  Driver::template reduce_each<rules::L2Norm>(OneOperand(call, 1), grad_norms.mutable_data_ptr<double>());
  // Those of the gradients as the rule will see them.
  if (common.grad_scale) grad_norms.div_(*common.grad_scale);
  if (common.grad_factor) grad_norms.mul_(*common.grad_factor);
  call.use_scalars(0, param_norms.const_data_ptr<double>());
  call.use_scalars(1, grad_norms.const_data_ptr<double>());
  call.commit();
  Driver::run(rule, call);
}

OPTIM_EXT_INSTANTIATE_OP(lars_)

}  // namespace optim_ext::ops
