#include "local_view.h"

#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "gradients.h"
#include "state_items.h"
#include "torch_internals.h"

namespace optim_ext::ops {

namespace {

using at::Tensor;

// What a DTensor consists of, borrowed from it: the tensor that this process has, and what says how the whole is laid
// out. Null where a slot is empty.
class DTensorType {
 public:
  explicit DTensorType(const py::object& type) : type_(type), local_(type, "_local_tensor"), spec_(type, "_spec") {}
  bool is_type_of(PyObject* object) const { return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(type_.ptr()); }
  PyObject* local(PyObject* dtensor) const { return local_.of(dtensor); }
  PyObject* spec(PyObject* dtensor) const { return spec_.of(dtensor); }
  bool reads_directly() const { return local_.reads_directly() && spec_.reads_directly(); }

 private:
  py::object type_;
  internals::Slot local_, spec_;
};

// Whether an object is of a class of tensors without operations of its own. (What key sets say comes on top.)
bool is_of_plain_class(PyObject* object) {
  return object != nullptr && (Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(THPVariableClass) ||
                               Py_TYPE(object) == internals::parameter_type());
}

// The tensor behind an object that is one, without operations of its own; else null.
const c10::TensorImpl* plain_tensor(PyObject* object) {
  if (!is_of_plain_class(object) || is_intercepted(THPVariable_Unpack(object))) return nullptr;
  return THPVariable_Unpack(object).unsafeGetTensorImpl();
}

// The DTensors among an optimizer's parameters and state, each with a stand-in: a plain tensor that is, during a step,
// the local tensor of the DTensor in all but identity, with the local tensor of its gradient as gradient. Between steps
// a stand-in has no memory and no gradient, so that none of this keeps any alive.
class DTensorParts {
 public:
  using Pair = std::pair<py::object, Tensor>;  // a DTensor and its stand-in, made from its local tensor by detach()

  // params, state: each DTensor once.
  DTensorParts(const py::object& type, const py::list& param_groups, const py::dict& state,
               const std::vector<Pair>& params, const std::vector<Pair>& others)
      : type_(type) {
    for (const py::handle group : param_groups) {
      groups_.emplace_back();
      for (const py::handle param : params_of(group)) groups_.back().push_back(param.ptr());
    }
    for (const auto& [whole, stand_in] : params) parts_.push_back(part_of(whole.ptr(), stand_in));
    likes_.resize(parts_.size());
    for (const auto& [whole, stand_in] : others) parts_.push_back(part_of(whole.ptr(), stand_in));
    std::unordered_set<PyObject*> tensors;
    PyObject *key, *entry;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &entry);) {
      PyObject *name, *value;
      if (!PyDict_Check(entry)) continue;
      for (Py_ssize_t inner = 0; PyDict_Next(entry, &inner, &name, &value);) {
        if (is_tensor(value)) tensors.insert(value);
      }
    }
    state_ = StateItems(state, tensors);
  }

  // Makes stand-ins what they stand for. Gives the numbers of the parameters whose gradients have to be looked into,
  // and are not there yet: they are laid out otherwise as far as is known, or no DTensors. None, with nothing changed,
  // where groups, parameters or state are not the objects that they were, or have other parts. `with_state`: or else
  // parameters and gradients alone are wanted.
  std::optional<std::vector<size_t>> lend(const py::object& param_groups, const py::object& state, bool with_state) {
    if (!has_same_params(param_groups) || (with_state && !has_same_state(state))) return std::nullopt;
    const size_t count = with_state ? parts_.size() : likes_.size();
    for (size_t i = 0; i < count; ++i) {
      fetch(i, count);
      if (!stand_in(parts_[i])) {
        take_back(false);
        return std::nullopt;
      }
    }
    std::vector<size_t> others;
    for (size_t i = 0; i < likes_.size(); ++i) {
      if (i + kAhead < likes_.size()) internals::fetch_grad(impl_of(parts_[i + kAhead].whole));
      if (i + kAhead / 2 < likes_.size())
        fetch_whole(internals::grad_of(impl_of(parts_[i + kAhead / 2].whole)).unsafeGetTensorImpl());
      if (!take_grad(type_, parts_[i], likes_[i])) others.push_back(i);
    }
    return others;
  }

  // A gradient for a parameter whose own lend() has left out.
  void lend_grad(size_t number, const py::object& grad) {
    parts_.at(number).stand_in.mutable_grad() = *optional_tensor(grad);
  }

  // From now on gradients with this layout are known to be laid out as parameter `number` is.
  void know(size_t number, const py::object& spec) { likes_.at(number) = spec; }

  // Stand-ins are nothing again. `written`: autograd is told that the DTensors of parameters with gradients were.
  void take_back(bool written) {
    const bool directly = internals::counts_versions_directly();
    for (size_t i = 0; i < parts_.size(); ++i) {
      c10::TensorImpl& own = *parts_[i].stand_in.unsafeGetTensorImpl();
      if (own.unsafe_storage()) internals::drop_storage(own);
      if (i >= likes_.size() || !internals::grad_of(own).defined()) continue;
      own.mutable_grad().reset();
      if (written) internals::bump_version(impl_of(parts_[i].whole), directly);
    }
  }

 private:
  static constexpr size_t kAhead = 8;

  struct Part {
    PyObject* whole;  // borrowed: whoever asks finds it in a living container first
    Tensor stand_in;
    py::object spec;
  };

  Part part_of(PyObject* whole, const Tensor& stand_in) const {
    TORCH_CHECK(type_.is_type_of(whole), "optim_ext: expected a DTensor, found a ", Py_TYPE(whole)->tp_name);
    stand_in.unsafeGetTensorImpl()->set_allow_tensor_metadata_change(true);
    return {whole, stand_in, py::reinterpret_borrow<py::object>(type_.spec(whole))};
  }

  static const c10::TensorImpl& impl_of(PyObject* tensor) { return *THPVariable_Unpack(tensor).unsafeGetTensorImpl(); }

  bool has_same_params(const py::object& param_groups) const {
    if (!PyList_Check(param_groups.ptr())) return false;
    if (static_cast<size_t>(PyList_GET_SIZE(param_groups.ptr())) != groups_.size()) return false;
    static PyObject* const key = PyUnicode_InternFromString("params");
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
      PyObject* const params = PyDict_Check(group) ? PyDict_GetItem(group, key) : nullptr;
      if (!params || !(PyList_Check(params) || PyTuple_Check(params)) ||
          static_cast<size_t>(PySequence_Fast_GET_SIZE(params)) != groups_[g].size() ||
          !std::equal(groups_[g].begin(), groups_[g].end(), PySequence_Fast_ITEMS(params)))
        return false;
    }
    return true;
  }

  bool has_same_state(const py::object& state) const {
    if (!PyDict_Check(state.ptr()) || !state_.has_same_entries(state.ptr())) return false;
    for (size_t i = 0; i < state_.size(); ++i) {
      if (i + 2 * kAhead < state_.size()) state_.fetch_entry(i + 2 * kAhead);
      if (i + kAhead < state_.size()) state_.fetch_items(i + kAhead);
      if (!state_.is_unchanged(i)) return false;
    }
    return true;
  }

  bool stand_in(const Part& part) const {
    if (!type_.is_type_of(part.whole) || type_.spec(part.whole) != part.spec.ptr()) return false;
    PyObject* const object = type_.local(part.whole);
    if (!is_of_plain_class(object)) return false;
    // A stand-in has a key set without operations of its own, and is no inference tensor.
    const c10::TensorImpl* const local = THPVariable_Unpack(object).unsafeGetTensorImpl();
    c10::TensorImpl& own = *part.stand_in.unsafeGetTensorImpl();
    if (local->key_set() != own.key_set() || local->dtype() != own.dtype() || local->device() != own.device() ||
        local->sizes() != own.sizes() || local->strides() != own.strides())
      return false;
    internals::lend_storage(own, *local);
    if (own.storage_offset() != local->storage_offset()) own.set_storage_offset(local->storage_offset());
    if (internals::version_of(own) != internals::version_of(*local)) own.set_version_counter(local->version_counter());
    return true;
  }

  // False where there is a gradient that is another, which is left out.
  static bool take_grad(const DTensorType& type, const Part& part, const py::object& like) {
    const Tensor& grad = internals::grad_of(impl_of(part.whole));
    if (!grad.defined()) return true;
    const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
    if (!type.is_type_of(object.ptr())) return false;
    PyObject* const spec = type.spec(object.ptr());
    PyObject* const local = type.local(object.ptr());
    if ((spec != part.spec.ptr() && spec != like.ptr()) || plain_tensor(local) == nullptr) return false;
    part.stand_in.mutable_grad() = THPVariable_Unpack(local);
    return true;
  }

  // Asks for the memory that stand_in() will read of the parts to come: of a DTensor, then of the object of its local
  // tensor, then of that tensor.
  void fetch(size_t i, size_t count) const {
    if (i + 3 * kAhead < count) __builtin_prefetch(parts_[i + 3 * kAhead].whole);
    if (PyObject* const next = i + 2 * kAhead < count ? parts_[i + 2 * kAhead].whole : nullptr;
        next != nullptr && type_.is_type_of(next))
      __builtin_prefetch(type_.local(next));
    if (i + kAhead >= count) return;
    PyObject* const whole = parts_[i + kAhead].whole;
    PyObject* const local = type_.is_type_of(whole) ? type_.local(whole) : nullptr;
    if (is_of_plain_class(local)) fetch_whole(THPVariable_Unpack(local).unsafeGetTensorImpl());
    fetch_whole(parts_[i + kAhead].stand_in.unsafeGetTensorImpl());
  }
  static void fetch_whole(const c10::TensorImpl* tensor) {
    const char* const at = reinterpret_cast<const char*>(tensor);
    for (size_t line = 0; line < sizeof(*tensor); line += 64) __builtin_prefetch(at + line);
  }

  DTensorType type_;
  std::vector<std::vector<PyObject*>> groups_;  // identities
  std::vector<Part> parts_;                     // of parameters, then of state
  std::vector<py::object> likes_;               // by parameter: another layout that is the same by value
  StateItems state_;
};

// Whether a parameter of any group is exactly of this type.
bool any_of_type(const py::object& param_groups, const py::object& type) {
  for (const py::handle group : param_groups) {
    for (const py::handle param : py::object(group[py::str("params")])) {
      if (Py_TYPE(param.ptr()) == reinterpret_cast<PyTypeObject*>(type.ptr())) return true;
    }
  }
  return false;
}

}  // namespace

void bind_local_view(py::module_& m) {
  py::class_<DTensorParts>(m, "DTensorParts", "The DTensors among an optimizer's parameters and state, with stand-ins.")
      .def(py::init([](const py::object& type, const py::list& param_groups, const py::dict& state,
                       const py::list& params, const py::list& others) {
             const auto pairs = [](const py::list& given) {
               std::vector<DTensorParts::Pair> found;
               for (const py::handle pair : given) {
                 const py::object whole = pair[py::int_(0)], stand_in = pair[py::int_(1)];
                 found.emplace_back(whole, *optional_tensor(stand_in));
               }
               return found;
             };
             return std::make_unique<DTensorParts>(type, param_groups, state, pairs(params), pairs(others));
           }),
           py::arg("type"), py::arg("param_groups"), py::arg("state"), py::arg("params"), py::arg("others"))
      .def("lend", &DTensorParts::lend, py::arg("param_groups"), py::arg("state"), py::arg("with_state") = true)
      .def("lend_grad", py::overload_cast<size_t, const py::object&>(&DTensorParts::lend_grad), py::arg("number"),
           py::arg("grad"))
      .def("know", &DTensorParts::know, py::arg("number"), py::arg("spec"))
      .def("take_back", &DTensorParts::take_back, py::arg("written"));
  m.def("any_of_type", &any_of_type, py::arg("param_groups"), py::arg("type"),
        "Whether a parameter of any group is exactly of this type.");
  m.def(
      "reads_dtensors_directly", [](const py::object& type) { return DTensorType(type).reads_directly(); },
      py::arg("type"), "Whether the parts of a DTensor are read where they lie, without a look-up by name.");
}

}  // namespace optim_ext::ops
