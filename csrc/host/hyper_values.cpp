#include "hyper_values.h"

#include <ATen/ScalarOps.h>

#include <algorithm>
#include <string>

namespace optim_ext::ops {

template <>
bool from_python<bool>(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

template <>
double from_python<double>(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <>
int64_t from_python<int64_t>(PyObject* value) {
  const int64_t number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <>
Tensor from_python<Tensor>(PyObject* value) {
  if (THPVariable_Check(value)) return THPVariable_Unpack(value);
  return c10::scalar_to_tensor(from_python<double>(value));
}

bool is_plain_number(PyObject* value) {
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value);
}

namespace {

HyperValue read_hyper(HyperKind kind, PyObject* object) {
  HyperValue value;
  switch (kind) {
    case HyperKind::number: value.number = from_python<double>(object); break;
    case HyperKind::tensor: value.tensor = from_python<Tensor>(object); break;
    case HyperKind::flag: value.flag = from_python<bool>(object); break;
    case HyperKind::whole: value.whole = from_python<int64_t>(object); break;
  }
  return value;
}

}  // namespace

std::vector<HyperValue> read_hypers(const StepOp& op, PyObject* tuple) {
  std::vector<HyperValue> values;
  for (size_t i = 0; i < op.hypers.size(); ++i)
    values.push_back(read_hyper(op.hypers[i].kind, PyTuple_GET_ITEM(tuple, i)));
  return values;
}

bool NumberHypers::read(PyObject* tuple) {
  for (size_t i = 0; i < values_.size(); ++i) {
    if (!is_plain_number(PyTuple_GET_ITEM(tuple, i))) return false;
  }
  for (size_t i = 0; i < values_.size(); ++i) set(i, PyTuple_GET_ITEM(tuple, i));
  return true;
}

void NumberHypers::set(size_t i, PyObject* number) {
  if (kept_[i].ptr() == number) return;
  values_[i] = read_hyper(op_->hypers[i].kind, number);
  kept_[i] = py::reinterpret_borrow<py::object>(number);
}

namespace {

bool never_changes(PyObject* value) {
  if (!PyTuple_CheckExact(value)) return value == Py_None || is_plain_number(value) || PyUnicode_CheckExact(value);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
    if (!is_plain_number(PyTuple_GET_ITEM(value, i))) return false;
  }
  return true;
}

}  // namespace

bool GroupOptions::remember(const py::dict& group, const py::object& names) {
  items_.clear();
  kept_.clear();
  for (const auto& [key, value] : group) {
    const bool matters = names.contains(key) && !key.equal(py::str("lr"));
    if (matters && !never_changes(value.ptr())) return false;
    items_.push_back({key.ptr(), matters ? value.ptr() : nullptr});
    kept_.push_back(py::reinterpret_borrow<py::object>(key));
    if (matters) kept_.push_back(py::reinterpret_borrow<py::object>(value));
  }
  return true;
}

bool GroupOptions::are_unchanged(PyObject* group) const {
  return PyDict_Check(group) && internals::holds(group, items_.data(), items_.size());
}

}  // namespace optim_ext::ops
