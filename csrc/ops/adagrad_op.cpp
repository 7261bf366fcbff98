#include "../rules/adagrad.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct Row : StepRow<rules::Adagrad> {
  static constexpr bool kTakesSparse = true;
  static bool takes_sparse(const Options& options) { return options.weight_decay == 0.0; }
};

const RegisteredStepOp<"adagrad_", Row> adagrad;

}  // namespace

}  // namespace optim_ext::ops
