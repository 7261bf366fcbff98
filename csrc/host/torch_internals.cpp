#include "torch_internals.h"

#include <ATen/ops/empty.h>
#include <structmember.h>

#include <cstdint>
#include <cstring>

namespace optim_ext::ops::internals {

namespace {

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030F0000 && !defined(Py_GIL_DISABLED)
#define OPTIM_EXT_KNOWS_DICTS 1

// struct _dictkeysobject of CPython, up to its table of indices, which the entries follow.
struct DictKeys {
  Py_ssize_t owners;
  uint8_t log2_size, log2_index_bytes, kind;
  uint32_t version;
  Py_ssize_t usable, entries;
  const char* end_of_indices() const {
    return reinterpret_cast<const char*>(this + 1) + (size_t{1} << log2_index_bytes);
  }
};
constexpr uint8_t kGeneral = 0, kUnicode = 1;  // kinds: entries with and without the hash of their keys

struct GeneralEntry {
  Py_hash_t hash;
  PyObject *key, *value;
};
struct UnicodeEntry {
  PyObject *key, *value;
};

template <class Entry>
bool holds_entries(const DictKeys& keys, const Item* items, size_t count) {
  const auto* const entries = reinterpret_cast<const Entry*>(keys.end_of_indices());
  for (size_t i = 0; i < count; ++i) {
    if (entries[i].key != items[i].key || (items[i].value && entries[i].value != items[i].value)) return false;
  }
  return true;
}

// Nothing where a dict is of a kind that has to be walked: keys that dicts share, or gaps where items were deleted.
std::optional<bool> holds_directly(PyObject* dict, const Item* items, size_t count) {
  const auto* const object = reinterpret_cast<const PyDictObject*>(dict);
  const auto* const keys = reinterpret_cast<const DictKeys*>(object->ma_keys);
  if (object->ma_values != nullptr || static_cast<size_t>(keys->entries) != count) return std::nullopt;
  if (keys->kind == kUnicode) return holds_entries<UnicodeEntry>(*keys, items, count);
  if (keys->kind == kGeneral) return holds_entries<GeneralEntry>(*keys, items, count);
  return std::nullopt;
}

// On two dicts of a kind each.
bool try_direct_reading() {
  bool right = true;
  for (const bool named : {true, false}) {
    const auto dict = py::dict();
    std::vector<py::object> kept;
    std::vector<Item> items;
    for (int i = 0; i < 9; ++i) {
      py::object key = named ? py::object(py::str(std::string("item ") + std::to_string(i))) : py::object(py::int_(i));
      py::object value = py::cast(1000.5 + i);
      dict[key] = value;
      items.push_back({key.ptr(), value.ptr()});
      kept.insert(kept.end(), {key, value});
    }
    right = right && holds_directly(dict.ptr(), items.data(), items.size()) == std::optional(true);
    std::swap(items[7].value, items[8].value);
    right = right && holds_directly(dict.ptr(), items.data(), items.size()) == std::optional(false);
  }
  return right;
}
#endif

bool walk(PyObject* dict, const Item* items) {
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++items) {
    if (key != items->key || (items->value && value != items->value)) return false;
  }
  return true;
}

}  // namespace

bool reads_dicts_directly() {
#if defined(OPTIM_EXT_KNOWS_DICTS)
  static const bool direct = try_direct_reading();
  return direct;
#else
  return false;
#endif
}

void fetch_dict(PyObject* dict) {
  const auto* const keys = reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(dict)->ma_keys);
  __builtin_prefetch(keys);
  __builtin_prefetch(keys + 64);
}

bool holds(PyObject* dict, const Item* items, size_t count) {
  if (static_cast<size_t>(PyDict_GET_SIZE(dict)) != count) return false;
#if defined(OPTIM_EXT_KNOWS_DICTS)
  if (reads_dicts_directly()) {
    if (const std::optional<bool> found = holds_directly(dict, items, count)) return *found;
  }
#endif
  return walk(dict, items);
}

bool counts_versions_directly() {
  static const bool direct = [] {
    const at::Tensor tensor = at::empty({1});
    c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    bool right = true;
    for (uint32_t i = 0; i < 3; ++i) {
      right = right && *version_of(impl) == impl.version_counter().current_version();
      if (right) i % 2 == 0 ? impl.bump_version() : bump_version(impl, true);
    }
    return right && impl.version_counter().current_version() == 3;
  }();
  return direct;
}

Slot::Slot(const pybind11::object& type, const char* name) : name_(pybind11::str(name)) {
  const pybind11::object descriptor = type.attr(name_);
  if (!Py_IS_TYPE(descriptor.ptr(), &PyMemberDescr_Type)) return;
  const PyMemberDef& member = *reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member;
  if (member.type == T_OBJECT_EX) offset_ = member.offset;
}

PyObject* Slot::by_name(PyObject* object) const {
  PyObject* const value = PyObject_GetAttr(object, name_.ptr());
  if (value == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  Py_DECREF(value);  // the object has it
  return value;
}

PyTypeObject* parameter_type() {
  static PyObject* const type =
      pybind11::object(pybind11::module_::import("torch.nn").attr("Parameter")).release().ptr();
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace optim_ext::ops::internals
