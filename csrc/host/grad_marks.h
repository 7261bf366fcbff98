// Which gradients a norm was taken of, so that it is used for these and no others.
#pragma once

#include <pybind11/pybind11.h>

namespace optim_ext::ops {

// Adds the class GradMarks to the module.
void bind_grad_marks(pybind11::module_& m);

}  // namespace optim_ext::ops
