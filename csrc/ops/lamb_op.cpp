#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "../rules/lamb.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct LambRow : StepRow<rules::LambStep> {
  static constexpr bool kTakesCompanions = true, kCompanionsOnGpu = true;

  template <class Driver>
  static void run(const StepArguments<Options>& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    rules::LambUpdate update{};
    const CallSpec spec{.op = given.op,
                        .controls = given.controls,
                        .operands = {given.operand(0), given.operand(1), given.operand(2), given.operand(3)},
                        .state_steps = given.steps(),
                        .takes_companions = true,
                        .companions_on_gpu = true};
    Call call(spec, rules::LambUpdate::kOperands, rules::LambUpdate::kUsed, rules::LambUpdate::kUpdates);
    given.fill(call, update.step_of, &update, sizeof update);
    check_derived(call, update.step_of, &update);
    if (CheckOnly::active() || call.empty() || call.skip) return;

    const auto count = static_cast<int64_t>(call.bundles.size());
    const Tensor norms = at::empty({2, count}, at::TensorOptions().device(call.device).dtype(at::kDouble));
    auto* const param_norms = norms.mutable_data_ptr<double>();
    call.commit();
    // What both rules keep in common lies at the same place in each, so hyper-parameters on the device reach both.
    static_assert(offsetof(rules::LambDirection, step_of) == offsetof(rules::LambUpdate, step_of));
    Driver::run_for_norms(rules::LambDirection{update.step_of}, call, param_norms, param_norms + count);
    call.begin_second_rule();
    call.use_scalars(0, param_norms);
    call.use_scalars(1, param_norms + count);
    Driver::run(update, call);
  }
};

const RegisteredStepOp<"lamb_", LambRow> lamb;

}  // namespace

}  // namespace optim_ext::ops
