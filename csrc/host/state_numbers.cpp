#include "state_numbers.h"

#include <ATen/ops/zeros.h>

namespace optim_ext::ops {

std::optional<double> StateNumbers::number_of(PyObject* value) {
  const py::object as_float = py::reinterpret_steal<py::object>(PyNumber_Float(value));
  if (as_float) return PyFloat_AS_DOUBLE(as_float.ptr());
  PyErr_Clear();
  return std::nullopt;
}

const at::Tensor& StateNumbers::tensor_of(PyObject* entry, size_t k, const py::object& key) {
  Number& number = numbers_[{entry, k}];
  if (!number.tensor.defined()) number = {key, at::zeros({}, at::kDouble)};
  return number.tensor;
}

bool StateNumbers::read() {
  for (auto& [place, number] : numbers_) {
    PyObject* const value = PyDict_GetItemWithError(place.first, number.key.ptr());
    const std::optional<double> found = value ? number_of(value) : std::nullopt;
    if (!found) return false;
    number.value = *number.tensor.mutable_data_ptr<double>() = *found;
  }
  return true;
}

void StateNumbers::write() const {
  for (const auto& [place, number] : numbers_) {
    const double value = *number.tensor.const_data_ptr<double>();
    if (value == number.value) continue;
    const py::object as_int = py::reinterpret_steal<py::object>(PyLong_FromDouble(value));
    if (!as_int || PyDict_SetItem(place.first, number.key.ptr(), as_int.ptr()) < 0) throw py::error_already_set();
  }
}

}  // namespace optim_ext::ops
