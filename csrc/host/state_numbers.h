// State that torch keeps in Python numbers, a count of steps, and the tensors an op sees in their place.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <map>
#include <optional>
#include <utility>

namespace optim_ext::ops {

namespace py = pybind11;

class StateNumbers {
 public:
  // The value of a Python object, if it is a number.
  static std::optional<double> number_of(PyObject* value);

  // The tensor for what a dict of the state has under a key, for list `k` of the op: the same one wherever a parameter
  // occurs more than once.
  const at::Tensor& tensor_of(PyObject* entry, size_t k, const py::object& key);
  // Python's numbers to the tensors. False where one is no longer a number.
  bool read();
  // The tensors' numbers to Python, where a step has changed them.
  void write() const;

 private:
  struct Number {
    py::object key;
    at::Tensor tensor;
    double value = 0.0;  // when the step began
  };
  std::map<std::pair<PyObject*, size_t>, Number> numbers_;  // by the state's dict they are in, and the op's list
};

}  // namespace optim_ext::ops
