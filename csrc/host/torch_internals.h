// What the host path takes for granted of CPython and torch beyond what they promise, all in one place. Each has a test
// (tests/optim/test_internals.py), and what can be found out when the module is loaded is found out then.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <Python.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace optim_ext::ops::internals {

// An item of a dict by identity; a value of null stands for any.
struct Item {
  PyObject* key;
  PyObject* value;
};

// Whether dicts are laid out as holds_directly() reads them (CPython 3.11 to 3.14; before and after that PyDict_Next,
// which is a call for each item, has to do).
bool reads_dicts_directly();

// Asks for the memory that holds() will read of a dict.
void fetch_dict(PyObject* dict);

// Whether a dict holds exactly these items, in this order. The caller holds the GIL, or a thread that waits does.
bool holds(PyObject* dict, const Item* items, size_t count);

// The gradient of a tensor. TensorImpl::grad() finds it by two calls into other libraries.
inline const at::Tensor& grad_of(const c10::TensorImpl& tensor) {
  static const at::Tensor none;
  const auto* const meta = static_cast<const torch::autograd::AutogradMeta*>(tensor.autograd_meta());
  return meta != nullptr ? meta->grad_ : none;
}

// Asks for the memory that grad_of() will read.
inline void fetch_grad(const c10::TensorImpl& tensor) {
  const auto* const meta = static_cast<const torch::autograd::AutogradMeta*>(tensor.autograd_meta());
  if (meta != nullptr) __builtin_prefetch(&meta->grad_);
}

// Whether the version of a tensor lies where bump_version() looks for it.
bool counts_versions_directly();
inline uint32_t* version_of(const c10::TensorImpl& tensor) {
  char* counter;  // all that a VariableVersion holds
  static_assert(sizeof(tensor.version_counter()) == sizeof counter);
  std::memcpy(&counter, &tensor.version_counter(), sizeof counter);
  return reinterpret_cast<uint32_t*>(counter + sizeof(c10::intrusive_ptr_target));
}

// Asks for the memory that bump_version() will write.
inline void fetch_version(const c10::TensorImpl& tensor) { __builtin_prefetch(version_of(tensor), 1); }

// TensorImpl::bump_version() without its lock of the memory bus, which costs as much as updating 16 elements. Where
// another thread writes the same tensor at the same time the version moves on by less than two, but it does move on.
// Not for inference tensors, which have no version.
inline void bump_version(const c10::TensorImpl& tensor, bool directly) {
  if (!directly) return const_cast<c10::TensorImpl&>(tensor).bump_version();
  const std::atomic_ref<uint32_t> version(*version_of(tensor));
  version.store(version.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

// Makes the memory of a tensor that of another of the same dtype on the same device, or none at all, without the checks
// and the counting that TensorImpl::set_storage_keep_dtype() does. Without memory a tensor must not be used.
inline void lend_storage(const c10::TensorImpl& to, const c10::TensorImpl& from) {
  const_cast<c10::Storage&>(to.unsafe_storage()) = from.unsafe_storage();
}
inline void drop_storage(const c10::TensorImpl& tensor) {
  const_cast<c10::Storage&>(tensor.unsafe_storage()) = c10::Storage();
}

// A slot of a Python class (`__slots__`), read where its descriptor says that it lies.
class Slot {
 public:
  // type: the class; Python's AttributeError where it has no such attribute.
  Slot(const pybind11::object& type, const char* name);
  // What the object, which is of the class, has there: borrowed from it, null where there is nothing.
  PyObject* of(PyObject* object) const {
    if (offset_ > 0) return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
    return by_name(object);
  }
  bool reads_directly() const { return offset_ > 0; }

 private:
  PyObject* by_name(PyObject* object) const;

  pybind11::object name_;
  Py_ssize_t offset_ = 0;  // in the object; 0: not known
};

// torch.nn.Parameter.
PyTypeObject* parameter_type();

// Whether nothing sits between a caller and the kernel of an op on plain tensors: no mode in Python, no transform or
// tracer, no inference mode, no profiler. A call that goes by the dispatcher would then reach the kernel and nobody
// else.
inline bool calls_reach_kernels() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::hasCallbacks() &&
         c10::impl::tls_local_dispatch_key_set().included_ == c10::default_included_set;
}

// Whether a thread that has the GIL keeps all others from Python's objects for as long as it runs no Python code.
#if defined(Py_GIL_DISABLED)
constexpr bool kGilKeepsOthersOut = false;
#else
constexpr bool kGilKeepsOthersOut = true;
#endif

}  // namespace optim_ext::ops::internals
