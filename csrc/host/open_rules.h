// What Python tells of rules that are written in it.
#pragma once

#include <pybind11/pybind11.h>

namespace optim_ext::ops {

// Adds to the module what defines an optimizer's op, its variants, and what they are run by.
void bind_open_rules(pybind11::module_& m);

}  // namespace optim_ext::ops
