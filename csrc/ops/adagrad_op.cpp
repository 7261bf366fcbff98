#include "../rules/adagrad.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"adagrad_", StepRow<rules::Adagrad>> adagrad;
}

}  // namespace optim_ext::ops
