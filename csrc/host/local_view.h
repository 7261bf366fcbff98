// Parameters that are DTensors, as this process has them: the one place that knows what a DTensor is made of.
#pragma once

#include <pybind11/pybind11.h>

namespace optim_ext::ops {

// Adds the class DTensorParts and any_of_type() to the module.
void bind_local_view(pybind11::module_& m);

}  // namespace optim_ext::ops
