#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "../rules/lars.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct LarsRow : StepRow<rules::Lars> {
  static constexpr bool kTakesCompanions = true, kCompanionsOnGpu = true;

  template <class Driver>
  static void run(const StepArguments<Options>& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const StepControls& controls = given.controls;
    rules::Lars rule{};
    const CallSpec spec{.op = given.op,
                        .controls = controls,
                        .operands = {given.operand(0), given.operand(1), given.operand(2)},
                        .takes_companions = true,
                        .companions_on_gpu = true};
    Call call(spec, rules::Lars::kOperands, rules::Lars::kUsed, rules::Lars::kUpdates);
    given.fill(call, rule);
    if (CheckOnly::active() || call.empty() || call.skip) return;

    const auto count = static_cast<int64_t>(call.bundles.size());
    const auto doubles = at::TensorOptions().device(call.device).dtype(at::kDouble);
    const Tensor param_norms = at::empty({count}, doubles), grad_norms = at::empty({count}, doubles);
    Driver::template reduce_each<rules::L2Norm>(call, param_norms.mutable_data_ptr<double>());
    Driver::template reduce_each<rules::L2Norm>(OneOperand(call, 1), grad_norms.mutable_data_ptr<double>());
    // Those of the gradients as the rule will see them.
    if (controls.grad_scale) grad_norms.div_(*controls.grad_scale);
    if (controls.grad_factor) grad_norms.mul_(*controls.grad_factor);
    call.use_scalars(0, param_norms.const_data_ptr<double>());
    call.use_scalars(1, grad_norms.const_data_ptr<double>());
    call.commit();
    Driver::run(rule, call);
  }
};

const RegisteredStepOp<"lars_", LarsRow> lars;

}  // namespace

}  // namespace optim_ext::ops
