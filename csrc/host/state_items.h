// What lies in an optimizer's state: its entries and their items, by identity. A plan is about these objects and none
// else, so every step compares them first.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "torch_internals.h"

namespace optim_ext::ops {

namespace py = pybind11;

class StateItems {
 public:
  StateItems() = default;
  // ours: the values that matter. Others may be replaced by anything under the same keys.
  StateItems(const py::dict& state, const std::unordered_set<PyObject*>& ours);

  // Whether the entries are the same objects under the same keys, in the same order.
  bool has_same_entries(PyObject* state) const { return internals::holds(state, entries_.data(), entries_.size()); }
  size_t size() const { return entries_.size(); }
  // Whether entry `i`, which has_same_entries() has found to be alive, holds what it held. Several threads may ask at
  // once while one has the GIL.
  bool is_unchanged(size_t i) const {
    PyObject* const dict = entries_[i].value;
    const size_t count = first_item_[i + 1] - first_item_[i];
    if (!PyDict_Check(dict)) return count == 0;  // not a dict that has died, at its address
    return internals::holds(dict, items_.data() + first_item_[i], count);
  }
  // Asks for what is_unchanged() will read of the entry, from further away and from nearer.
  void fetch_entry(size_t i) const { __builtin_prefetch(entries_[i].value); }
  void fetch_items(size_t i) const {
    if (PyDict_Check(entries_[i].value)) internals::fetch_dict(entries_[i].value);
  }
  // The entry of each key.
  std::unordered_map<PyObject*, size_t> places() const;

 private:
  std::vector<internals::Item> entries_, items_;
  std::vector<size_t> first_item_{0};  // of each entry, and the end
};

}  // namespace optim_ext::ops
