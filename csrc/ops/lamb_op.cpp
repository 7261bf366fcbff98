#include <ATen/core/LegacyTypeDispatch.h>

#include "../rules/lamb.h"
#include "step_op.h"
#include "whole_norms.h"

namespace optim_ext::ops {

namespace {

struct LambRow : StepRow<rules::LambStep> {
  static constexpr bool kTakesCompanions = true;

  template <class Driver>
  static void run(const StepArguments<Options>& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    rules::LambUpdate update{};
    const CallSpec spec{.op = given.op,
                        .controls = given.controls,
                        .operands = {given.operand(0), given.operand(1), given.operand(2), given.operand(3)},
                        .state_steps = given.steps(),
                        .takes_companions = true};
    Call call(spec, rules::LambUpdate::kOperands, rules::LambUpdate::kUsed, rules::LambUpdate::kUpdates);
    given.fill(call, update.step_of, &update, sizeof update);
    check_derived(call, update.step_of, &update);
    if (call.empty() || call.skip) return;

    const auto norms = norms_for_step(call, given.lists[0], given.controls, [&](const Tensor& taken) {
      // What both rules keep in common lies at the same place in each, so hyper-parameters on the device reach both.
      static_assert(offsetof(rules::LambDirection, step_of) == offsetof(rules::LambUpdate, step_of));
      Driver::run_for_norms(rules::LambDirection{update.step_of}, call, taken[0].template mutable_data_ptr<double>(),
                            taken[1].template mutable_data_ptr<double>());
      call.begin_second_rule();
    });
    if (!norms) return;
    call.use_scalars(0, (*norms)[0].template const_data_ptr<double>());
    call.use_scalars(1, (*norms)[1].template const_data_ptr<double>());
    Driver::run(update, call);
  }
};

const RegisteredStepOp<"lamb_", LambRow> lamb;

}  // namespace

}  // namespace optim_ext::ops
