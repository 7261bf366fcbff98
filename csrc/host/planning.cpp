#include "planning.h"

#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <map>
#include <tuple>
#include <unordered_map>

namespace optim_ext::ops {

namespace {

py::object item_or_null(const py::object& dict, const py::object& key) {
  if (!dict || !PyDict_Check(dict.ptr())) return {};
  PyObject* const value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(value);
}

}  // namespace

void Planning::add(const py::tuple& spec) {
  const auto group = py::cast<size_t>(spec[0]);
  const auto params = params_of(param_groups_[group]);
  const auto keys = py::cast<py::tuple>(spec[2]);
  TORCH_CHECK(keys.size() + kFirstState == op_.lists.size(), "optim_ext: ", keys.size(),
              " state keys given, the op takes ", op_.lists.size() - kFirstState);
  // One call per device, and per occurrence of a parameter that is in the group more than once: torch updates it that
  // many times in turn. Those that are averaged, and those with companions of one kind, make calls of their own.
  std::map<std::tuple<std::string, int, bool, std::string>, size_t> call_of;
  const auto ways = py::cast<py::tuple>(spec[5]);
  TORCH_CHECK(ways.size() == 0 || ways.size() == py::len(spec[1]), "optim_ext: ", ways.size(),
              " ways of keeping state given for ", py::len(spec[1]), " parameters");
  size_t member_of_spec = 0;
  std::unordered_map<PyObject*, int> occurrences;
  for (const auto& index : spec[1]) {
    const auto i = py::cast<int64_t>(index);
    const py::object param = params[i];
    TORCH_CHECK_TYPE(is_tensor(param.ptr()), describe(group, i, param_groups_), " is a ", Py_TYPE(param.ptr())->tp_name,
                     ", expected a tensor");
    const Member member{group, i, THPVariable_Unpack(param.ptr())};
    const Tensor& tensor = member.tensor;
    TORCH_CHECK(!tensor.is_conj(), name_of(member),
                " is a lazy conjugate view, expected a tensor of its own; call resolve_conj() on it");
    const bool averaged = averages_.contains(param);
    const py::object way = ways.size() == 0 ? py::object(py::none()) : py::object(ways[member_of_spec++]);
    const py::tuple own_keys = way.is_none() ? keys : py::cast<py::tuple>(way[py::int_(0)]);
    const auto place = std::make_tuple(tensor.device().str(), occurrences[param.ptr()]++, averaged,
                                       way.is_none() ? std::string() : std::string(py::repr(way)));
    const auto [found, is_new] = call_of.emplace(place, calls.size());
    if (is_new) calls.push_back(empty_call(spec, own_keys, way, tensor.device()));
    PlannedCall& call = calls[found->second];
    call.indices.push_back(i);
    call.lists[kParams].add(param.ptr());
    if (averaged) call.averages.add(py::object(averages_[param]).ptr());
    const py::object entry = item_or_null(state_, param);
    bool ready = true;
    for (size_t kind = 0; kind < call.companions.size(); ++kind) ready &= add_companion(call, member, entry, kind);
    for (size_t k = 0; k < keys.size(); ++k) {
      if (!own_keys[k].is_none()) ready &= add_state(call, member, entry, k, own_keys[k]);
    }
    call.ready.push_back(ready);
  }
  ++specs;
}

PlannedCall Planning::empty_call(const py::tuple& spec, const py::tuple& keys, const py::object& way,
                                 at::Device device) const {
  PlannedCall call{.group = py::cast<size_t>(spec[0]),
                   .spec = specs,
                   .device = device,
                   .indices = {},
                   .lists = std::vector<PythonTensors>(op_.lists.size()),
                   .takes_sparse = py::cast<bool>(spec[3]),
                   .takes_dense = py::cast<bool>(spec[4])};
  for (const auto& key : keys) call.keys.push_back(py::cast<std::string>(py::str(key)));
  if (!way.is_none()) call.companion_keys = py::cast<std::vector<std::string>>(way[py::int_(1)]);
  call.companions.resize(call.companion_keys.size());
  return call;
}

// Adds a parameter's companion; returns whether it is there.
bool Planning::add_companion(PlannedCall& call, const Member& member, const py::object& entry, size_t kind) {
  const std::string& key = call.companion_keys[kind];
  const py::object value = item_or_null(entry, py::str(key));
  const bool there = value && THPVariable_Check(value.ptr());
  // Where a part is in the whole is for the host to read.
  TORCH_CHECK(!there || key == "rounding_place" || THPVariable_Unpack(value.ptr()).device() == member.tensor.device(),
              name_of(member), ": its state '", key, "' is on ", THPVariable_Unpack(value.ptr()).device(),
              ", expected ", member.tensor.device());
  call.companions[kind].add(there ? value.ptr() : nullptr);
  if (there) state_tensors.insert(value.ptr());
  return there;
}

// Adds what a parameter has under one key; returns whether it is there, if it has to be.
bool Planning::add_state(PlannedCall& call, const Member& member, const py::object& entry, size_t k,
                         const py::object& key) {
  const py::object value = item_or_null(entry, key);
  const bool is_number = value && number_keys_.contains(key);
  TORCH_CHECK(!is_number || StateNumbers::number_of(value.ptr()), name_of(member), ": its state '",
              std::string(py::str(key)), "' is ", std::string(py::repr(value)), ", expected a number");
  const bool there = value && (is_number || THPVariable_Check(value.ptr()));
  // The dispatcher would take a call with one of these for one that only asks for shapes.
  TORCH_CHECK(!there || is_number || !THPVariable_Unpack(value.ptr()).is_meta() || member.tensor.is_meta(),
              name_of(member), ": its state '", std::string(py::str(key)), "' is on meta, expected ",
              member.tensor.device());
  if (is_number) {
    call.lists[kFirstState + k].add_own(numbers.tensor_of(entry.ptr(), k, key));
  } else {
    call.lists[kFirstState + k].add(there ? value.ptr() : nullptr);
  }
  if (there && !is_number) state_tensors.insert(value.ptr());
  const bool may_lack = partial_.contains(key);
  if (may_lack) call.partial.insert(kFirstState + k);
  return there || may_lack;
}

}  // namespace optim_ext::ops
