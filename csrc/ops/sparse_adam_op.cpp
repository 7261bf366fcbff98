#include "../rules/sparse_adam.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct Row : StepRow<rules::SparseAdam> {
  static constexpr bool kTakesSparse = true;
  static bool takes_sparse(const Options&) { return true; }
};

const RegisteredStepOp<"sparse_adam_", Row> sparse_adam;

}  // namespace

}  // namespace optim_ext::ops
