// What the host code needs to know of the gradients and parameters in an optimizer's param_groups.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "../call/parallel.h"
#include "../ops/run_average.h"

namespace optim_ext::ops {

namespace py = pybind11;

// A tensor whose operations are intercepted (DTensor, FakeTensor, functorch): only the dispatcher knows what it is.
bool is_intercepted(const at::Tensor& tensor);

// The tensor behind a Python object, nothing for None. Throws c10::TypeError for anything else.
std::optional<at::Tensor> optional_tensor(const py::object& value);

// Takes the gradients of `count` parameters, param(i) or null where that one is to be looked into, if all of them are
// of the same kind as `first`, one of them. False where they are not, with nothing taken. The caller holds the GIL,
// which the threads can do without: a tensor counts its owners atomically, and tells its Python object of the second
// one only. A gradient that has such an object has two already.
template <class Param>
bool take_usual(const at::Tensor& first, int64_t count, const Param& param, std::vector<at::Tensor>& grads) {
  constexpr int64_t kBlock = 16;
  const c10::DispatchKeySet keys = first.key_set();
  const caffe2::TypeMeta dtype = first.dtype();
  const at::Device device = first.device();
  std::atomic<bool> usual = true;
  grads.resize(count);
  over_tensors(device, count, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kBlock) {
      // Where the gradients are is found out ahead of looking at them, so that their cache misses overlap.
      const c10::TensorImpl* block[kBlock];
      const int64_t size = std::min(end - begin, kBlock);
      for (int64_t i = 0; i < size; ++i) {
        const c10::TensorImpl* const owner = param(begin + i);
        block[i] = owner ? owner->grad().unsafeGetTensorImpl() : nullptr;
        __builtin_prefetch(block[i], 1);
        __builtin_prefetch(block[i] ? reinterpret_cast<const char*>(block[i]) + 128 : nullptr);
      }
      for (int64_t i = 0; i < size; ++i) {
        if (!block[i] || block[i]->key_set() != keys || block[i]->dtype() != dtype || block[i]->device() != device) {
          usual = false;
          return;
        }
        grads[begin + i] = param(begin + i)->grad();
      }
    }
  });
  if (!usual) grads.clear();
  return usual;
}

// Lets go of them, on the threads that took them. The caller does not hold the GIL, which the last owner of a tensor
// may need.
inline void let_go(at::Device device, std::vector<at::Tensor>& grads) {
  over_tensors(device, static_cast<int64_t>(grads.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) grads[i].reset();
  });
}

// Whether a Python object is a tensor, by its type alone: no Python code runs.
bool is_tensor(PyObject* object);

// The parameters of a group, which may be any mapping that holds any iterable of them.
py::list params_of(const py::handle& group);

// A parameter as every message names it: by its name, or by its place.
std::string describe(size_t group, int64_t index, const py::object& param_groups);

// Adds describe(), grad_norm(), unsupported() and unsupported_grad() to the module.
void bind_gradients(py::module_& m);

}  // namespace optim_ext::ops
