#include "../rules/sparse_adam.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"sparse_adam_", StepRow<rules::SparseAdam>> sparse_adam;
}

}  // namespace optim_ext::ops
