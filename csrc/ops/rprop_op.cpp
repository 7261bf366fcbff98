#include "../rules/rprop.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {
const RegisteredStepOp<"rprop_", StepRow<rules::Rprop>> rprop;
}

}  // namespace optim_ext::ops
