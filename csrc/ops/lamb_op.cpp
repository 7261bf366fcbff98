#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void lamb_(const Common& common, TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
           TensorList state_steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
           bool maximize) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  rules::LambUpdate update{};
  rules::LambStep& step_of = update.step_of;
  step_of.maximize = maximize;
  const CallSpec spec{
      .common = common,
      .operands = {{"params", params}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
      .state_steps = state_steps};
  Call call(spec, rules::LambUpdate::kOperands, rules::LambUpdate::kUsed, rules::LambUpdate::kUpdates);
  call.set({{"lr", update.lr, lr},
            {"beta1", step_of.beta1, beta1},
            {"beta2", step_of.beta2, beta2},
            {"eps", step_of.eps, eps},
            {"weight_decay", step_of.weight_decay, weight_decay}},
           &update, sizeof update);
  if (CheckOnly::active() || call.empty() || call.skip) return;

  const auto count = static_cast<int64_t>(params.size());
  const Tensor norms = at::empty({2, count}, at::TensorOptions().device(call.device).dtype(at::kDouble));
  auto* const param_norms = norms.mutable_data_ptr<double>();
  call.commit();
  const auto live = std::exchange(call.device_hypers, {});  // a learning rate, which has no part in directions
  Driver::run_for_norms(rules::LambDirection{step_of}, call, param_norms, param_norms + count);
  call.device_hypers = live;
  call.begin_second_rule();
  call.use_scalars(0, param_norms);
  call.use_scalars(1, param_norms + count);
  Driver::run(update, call);
}

OPTIM_EXT_INSTANTIATE_OP(lamb_)

}  // namespace optim_ext::ops
