#include "../rules/radam.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"radam_", StepRow<rules::RAdam>> radam;
}

}  // namespace optim_ext::ops
