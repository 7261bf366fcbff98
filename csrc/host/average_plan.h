// The host path of an averaged model: from two modules to calls of average_ without a Python loop.
#pragma once

#include <pybind11/pybind11.h>

namespace optim_ext::ops {

// Adds the class AveragePlan to the module.
void bind_average_plan(pybind11::module_& m);

}  // namespace optim_ext::ops
