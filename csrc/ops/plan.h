// The host path: from an optimizer's Python objects to op calls without a Python loop.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../host/hyper_values.h"
#include "call.h"
#include "ops.h"
#include "step_ops.h"

namespace optim_ext::ops {

namespace py = pybind11;

// The weight of an average as an op on `device` takes it: a number the host knows stays on the host.
Tensor weight_for(c10::Device device, const Tensor& weight);

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

// Adds the class Plan to the module, and step_ops(): the table of every op that steps.
void bind_plan(py::module_& m);

}  // namespace optim_ext::ops
