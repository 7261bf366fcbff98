#include "../rules/lion.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"lion_", StepRow<rules::Lion>> lion;
}

}  // namespace optim_ext::ops
