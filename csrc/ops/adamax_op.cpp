#include "../rules/adamax.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"adamax_", StepRow<rules::Adamax>> adamax;
}

}  // namespace optim_ext::ops
