#include <ATen/core/LegacyTypeDispatch.h>

#include "../rules/lars.h"
#include "step_op.h"
#include "whole_norms.h"

namespace optim_ext::ops {

namespace {

struct LarsRow : StepRow<rules::Lars> {
  static constexpr bool kTakesCompanions = true;

  template <class Driver>
  static void run(const StepArguments<Options>& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const StepControls& controls = given.controls;
    rules::Lars rule{};
    const CallSpec spec{.op = given.op,
                        .controls = controls,
                        .operands = {given.operand(0), given.operand(1), given.operand(2)},
                        .takes_companions = true};
    Call call(spec, rules::Lars::kOperands, rules::Lars::kUsed, rules::Lars::kUpdates);
    given.fill(call, rule);
    if (call.empty() || call.skip) return;

    const auto norms = norms_for_step(call, given.lists[0], controls, [&](const Tensor& taken) {
      Driver::template reduce_each<rules::L2Norm>(call, taken[0].template mutable_data_ptr<double>());
      const Tensor of_grads = taken[1];
      Driver::template reduce_each<rules::L2Norm>(OneOperand(call, 1), of_grads.template mutable_data_ptr<double>());
      // Those of the gradients as the rule will see them.
      if (controls.grad_scale) of_grads.div_(*controls.grad_scale);
      if (controls.grad_factor) of_grads.mul_(*controls.grad_factor);
    });
    if (!norms) return;
    call.use_scalars(0, (*norms)[0].template const_data_ptr<double>());
    call.use_scalars(1, (*norms)[1].template const_data_ptr<double>());
    Driver::run(rule, call);
  }
};

const RegisteredStepOp<"lars_", LarsRow> lars;

}  // namespace

}  // namespace optim_ext::ops
