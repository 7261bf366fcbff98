// What the host code needs to know of the gradients and parameters in an optimizer's param_groups.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

namespace optim_ext::ops {

namespace py = pybind11;

// A tensor whose operations are intercepted (DTensor, FakeTensor, functorch): only the dispatcher knows what it is.
bool is_intercepted(const at::Tensor& tensor);

// The tensor behind a Python object, nothing for None.
std::optional<at::Tensor> optional_tensor(const py::object& value);

// The same value on another device. Nothing waits, unless it goes to the CPU, where it may be read at once.
std::optional<at::Tensor> moved_to(at::Device device, const std::optional<at::Tensor>& value);

// A parameter as messages name it: by its name, or by its place.
std::string describe(size_t group, int64_t index, const py::list& param_groups);

// Adds grad_norm(), unsupported() and unsupported_grad() to the module.
void bind_gradients(py::module_& m);

}  // namespace optim_ext::ops
