#include "../rules/adadelta.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"adadelta_", StepRow<rules::Adadelta>> adadelta;
}

}  // namespace optim_ext::ops
