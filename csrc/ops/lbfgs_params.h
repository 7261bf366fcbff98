// The parameters of an L-BFGS problem as Python holds them, on their way to the ops. A list given to an op from Python
// is converted tensor by tensor, which with many small parameters takes longer than the op.
#pragma once

#include <pybind11/pybind11.h>

namespace optim_ext::ops {

// Adds lbfgs_read(), lbfgs_read_grads() and lbfgs_move() to the module.
void bind_lbfgs_params(pybind11::module_& m);

}  // namespace optim_ext::ops
