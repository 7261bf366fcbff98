// L-BFGS' history for Python: parameters as the lists they are in, and state under torch's keys.
#pragma once

#include <pybind11/pybind11.h>

namespace optim_ext::ops {

// Adds the classes LbfgsHistory and LbfgsEvaluation to the module, and vectors_of_one_block().
void bind_lbfgs(pybind11::module_& m);

}  // namespace optim_ext::ops
