// What Python is told of the ops, and of what the host path knows of torch and the interpreter.
#pragma once

#include <pybind11/pybind11.h>

#include "../ops/step_ops.h"

namespace optim_ext::ops {

// Lists of tensors as (argument, key of state, role), hyper-parameters as (argument, kind, option, index in the tuple
// there or None).
pybind11::dict table_of(const StepOp& op);

// Adds step_ops(), the table of every op that steps, and is_observed() to the module.
void bind_op_tables(pybind11::module_& m);

}  // namespace optim_ext::ops
