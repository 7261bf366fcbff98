#include "../rules/asgd.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"asgd_", StepRow<rules::ASGD>> asgd;
}

}  // namespace optim_ext::ops
