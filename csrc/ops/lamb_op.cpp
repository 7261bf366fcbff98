#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>

#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

namespace {
const OptionalTensor kNone;
}

template <class Driver>
void lamb_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
           TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
           bool maximize) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  // The updates of all tensors, as precise as they are computed. Parameters take part in the checks as if the first
  // sweep wrote them; the second one does.
  std::vector<Tensor> updates;
  rules::LambUpdate update{};
  rules::LambMoments moments{};
  moments.maximize = maximize;
  {
    const CallSpec spec{
        .common = common,
        .operands = {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
        .state_steps = state_steps};
    Call checked(spec, 4, 15u, 13u);
    checked.set({{"lr", update.lr, lr}}, &update, sizeof update);
    if (checked.empty() || checked.skip) return;
  }
  for (const Tensor& param : params) {
    const bool is_half = param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf;
    updates.push_back(at::empty_like(param, param.options().dtype(is_half ? at::kFloat : param.scalar_type())));
  }
  const Common first{common.op, common.grad_scale, common.found_inf, common.grad_factor, {}, kNone};
  run<Driver>(moments,
              {.common = first,
               .operands = {{"params", params},
                            {"grads", grads},
                            {"exp_avgs", exp_avgs},
                            {"exp_avg_sqs", exp_avg_sqs},
                            {"updates", updates}},
               .state_steps = state_steps},
              {{"beta1", moments.beta1, beta1},
               {"beta2", moments.beta2, beta2},
               {"eps", moments.eps, eps},
               {"weight_decay", moments.weight_decay, weight_decay}});
  if (CheckOnly::active()) return;
  const std::vector<Tensor> param_norms = norms<Driver>(params, 2.0).unbind(),
                            update_norms = norms<Driver>(updates, 2.0).unbind();
  const Common second{common.op, kNone, common.found_inf, kNone, common.averages, common.average_weight};
  run<Driver>(update,
              {.common = second,
               .operands = {{"params", params}, {"updates", updates}},
               .scalars = {{"param_norms", param_norms}, {"update_norms", update_norms}}},
              {{"lr", update.lr, lr}});
}

OPTIM_EXT_INSTANTIATE_OP(lamb_)

}  // namespace optim_ext::ops
