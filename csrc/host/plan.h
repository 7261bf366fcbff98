// The host path: from an optimizer's Python objects to op calls without a Python loop.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../call/call.h"
#include "../ops/ops.h"
#include "../ops/step_ops.h"
#include "hyper_values.h"

namespace optim_ext::ops {

namespace py = pybind11;

// Calls `body` for Python: C++ exceptions as torch's own bindings raise them (ValueError, OutOfMemoryError, ...).
template <class Body>
auto as_torch_raises(const Body& body) {
  try {
    return body();
  } catch (const py::error_already_set&) {
    throw;
  } catch (const BadHyper& bad) {
    py::set_error(bad.divides ? PyExc_ZeroDivisionError : PyExc_ValueError, bad.what_without_backtrace());
    throw py::error_already_set();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    throw py::error_already_set();
  }
}

// Adds the class Plan to the module.
void bind_plan(py::module_& m);

}  // namespace optim_ext::ops
