#include "state_items.h"

namespace optim_ext::ops {

StateItems::StateItems(const py::dict& state, const std::unordered_set<PyObject*>& ours) {
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    entries_.push_back({key, value});
    PyObject *name, *item;
    if (PyDict_Check(value)) {
      for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &item);)
        items_.push_back({name, ours.count(item) ? item : nullptr});
    }
    first_item_.push_back(items_.size());
  }
}

std::unordered_map<PyObject*, size_t> StateItems::places() const {
  std::unordered_map<PyObject*, size_t> places;
  for (size_t i = 0; i < entries_.size(); ++i) places.emplace(entries_[i].key, i);
  return places;
}

}  // namespace optim_ext::ops
