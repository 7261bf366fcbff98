// The host path: from an optimizer's Python objects to op calls without a Python loop.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "call.h"
#include "ops.h"
#include "step_ops.h"

namespace optim_ext::ops {

namespace py = pybind11;

// Python values as the arguments of an op.
template <class T>
T from_python(PyObject* value);
template <>
bool from_python<bool>(PyObject* value);
template <>
double from_python<double>(PyObject* value);
template <>
int64_t from_python<int64_t>(PyObject* value);
template <>
Tensor from_python<Tensor>(PyObject* value);

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

// What a plan needs of an op: how many leading arguments are lists, how to check a call and how to make it.
class PlannedOp {
 public:
  explicit PlannedOp(const StepOp& op) : op_(op) {}
  size_t lists() const { return op_.lists.size(); }
  const char* list_name(size_t list) const { return op_.lists[list].name; }
  size_t hypers() const { return op_.hypers.size(); }  // arguments between the lists and those every op has
  void run(const std::vector<TensorList>& lists, PyObject* hypers, const CommonTensors& common, bool check_only) const;

 private:
  const StepOp& op_;
};

// Adds the class Plan to the module, and step_ops(): the table of every op that steps.
void bind_plan(py::module_& m);

}  // namespace optim_ext::ops
