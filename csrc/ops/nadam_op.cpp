#include "../rules/nadam.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"nadam_", StepRow<rules::NAdam>> nadam;
}

}  // namespace optim_ext::ops
