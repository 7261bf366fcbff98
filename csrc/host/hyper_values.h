// Hyper-parameters on their way from Python to an op.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../ops/step_ops.h"
#include "torch_internals.h"

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

// Whether this is a float, int or bool and no subclass of these: to read it runs no Python code, and it never changes.
bool is_plain_number(PyObject* value);

// All hyper-parameters of an op, from a tuple of as many. May run Python code.
std::vector<HyperValue> read_hypers(const StepOp& op, PyObject* tuple);

// Those of one group that are plain numbers, so that what is made of each is kept for as long as it is the same object.
class NumberHypers {
 public:
  explicit NumberHypers(const StepOp& op) : op_(&op), kept_(op.hypers.size()), values_(op.hypers.size()) {}

  // False, with nothing changed, where they are not.
  bool read(PyObject* tuple);
  void set(size_t i, PyObject* number);
  const std::vector<HyperValue>& values() const { return values_; }

 private:
  const StepOp* op_;
  std::vector<py::object> kept_;
  std::vector<HyperValue> values_;
};

// The options of a group as they were when its hyper-parameters were read.
class GroupOptions {
 public:
  // False where some of them may change without becoming other objects. names: those that matter.
  bool remember(const py::dict& group, const py::object& names);
  // Whether they are what they were, but for the rate.
  bool are_unchanged(PyObject* group) const;

 private:
  std::vector<internals::Item> items_;
  std::vector<py::object> kept_;
};

}  // namespace optim_ext::ops
