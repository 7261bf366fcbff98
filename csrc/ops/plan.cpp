#include "plan.h"

#include "average_plan.h"
#include "gradients.h"
#include "python_tensors.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <set>
#include <unordered_map>

namespace optim_ext::ops {

template <>
bool from_python<bool>(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

template <>
double from_python<double>(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <>
int64_t from_python<int64_t>(PyObject* value) {
  const int64_t number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

template <>
Tensor from_python<Tensor>(PyObject* value) {
  if (THPVariable_Check(value)) return THPVariable_Unpack(value);
  return c10::scalar_to_tensor(from_python<double>(value));
}

void PlannedOp::run(const std::vector<TensorList>& lists, PyObject* hypers, const CommonTensors& common,
                    bool check_only) const {
  std::vector<HyperValue> values(op_.hypers.size());
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* const value = PyTuple_GET_ITEM(hypers, i);
    switch (op_.hypers[i].kind) {
      case HyperKind::number: values[i].number = from_python<double>(value); break;
      case HyperKind::tensor: values[i].tensor = from_python<Tensor>(value); break;
      case HyperKind::flag: values[i].flag = from_python<bool>(value); break;
      case HyperKind::whole: values[i].whole = from_python<int64_t>(value); break;
    }
  }
  const py::gil_scoped_release no_gil;
  op_.run(lists, values.data(), common, check_only);
}

Tensor weight_for(c10::Device device, const Tensor& weight) {
  return weight.is_cpu() ? weight : *moved_to(device, weight);
}

namespace {

// A cache of what one optimizer hands to its op: where its parameters and state tensors are. The truth stays in Python:
// every step first walks param_groups and state and compares identities, and reports itself stale where anything was
// replaced. Between steps no tensor is held.
class Plan {
 public:
  // calls: one (group index, indices into group["params"], state keys, whether gradients may be sparse, whether they
  // may be dense) each; a key of None leaves that list empty. partial: keys of state that only some parameters have;
  // the op is given a list of these. averages: running averages by parameter, to be brought up to date with it.
  // numbers: keys of state that are Python numbers; the op is given tensors that hold these during the step.
  Plan(std::shared_ptr<PlannedOp> op, const py::list& param_groups, const py::dict& state, const py::list& calls,
       const py::dict& averages, const py::set& partial, const py::set& numbers)
      : op_(std::move(op)), groups_(py::len(param_groups)), partial_(partial), number_keys_(numbers) {
    for (const auto& item : calls) add_call(py::cast<py::tuple>(item), param_groups, state, averages);
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (const auto& param : params_of(param_groups[g])) groups_[g].push_back(param.ptr());
    }
    remember_state(state);
  }

  // Steps, or returns False without having written anything if the plan no longer describes the optimizer.
  // hypers: one tuple per call, in the order of the op's schema.
  bool step(const py::object& state, const py::object& param_groups, const py::list& hypers,
            const py::object& grad_scale, const py::object& found_inf, const py::object& grad_factor,
            const py::object& average_weight, bool check_only) {
    if (!is_current(state, param_groups)) return false;
    TORCH_CHECK(py::len(hypers) == spec_count_, "optim_ext: one tuple of hyper-parameters per call is needed");
    const CommonTensors common{
        optional_tensor(grad_scale),
        optional_tensor(found_inf),
        optional_tensor(grad_factor),
        {},
        average_weight.is_none() ? OptionalTensor() : OptionalTensor(from_python<Tensor>(average_weight.ptr()))};
    std::vector<Gathered> gathered(calls_.size());
    size_t to_make = 0;
    for (size_t c = 0; c < calls_.size(); ++c) {
      if (!gather(calls_[c], gathered[c])) return false;
      to_make += !gathered[c].grads.empty();
      to_make += common.average_weight && calls_[c].is_averaged() && !gathered[c].all;
    }
    if (!read_numbers()) return false;
    // One call checks itself before it writes. Several must all be sound before the first of them writes; and what a
    // mode in Python lets through comes back without its index.
    if (check_only || to_make > 1 || c10::impl::TorchDispatchModeTLS::any_modes_set())
      run_all(gathered, hypers, common, param_groups, true);
    if (!check_only) {
      run_all(gathered, hypers, common, param_groups, false);
      write_numbers();
    }
    {
      const py::gil_scoped_release no_gil;
      for (size_t c = 0; c < calls_.size(); ++c) let_go(calls_[c].device, gathered[c].grads);
    }
    return true;
  }

 private:
  struct PlannedCall {
    size_t group;
    c10::Device device;
    std::vector<int64_t> indices;      // into group["params"], for messages
    std::vector<PythonTensors> lists;  // params, (grads: empty), state...; an absent list is empty
    bool takes_sparse, takes_dense;
    std::vector<std::string> keys;  // of the state lists, for messages
    std::vector<uint8_t> ready;     // whether the state of a parameter is there
    PythonTensors averages;         // of the parameters; empty where they are not averaged
    std::set<size_t> partial;       // lists with undefined tensors, which the op is not given
    std::unique_ptr<KnownCalls> known = std::make_unique<KnownCalls>();
    bool is_averaged() const { return averages.size() > 0; }
  };
  // A call's tensors for one step.
  struct Gathered {
    TakenTensors taken;  // the call's lists, and last the averages
    bool all = true;     // every parameter takes part: the lists serve as they are
    std::vector<Tensor> grads;
    std::vector<int64_t> members;  // into the lists, where not all take part
    std::vector<int64_t> idle;     // the others: without a gradient there is nothing to do but to average
  };
  struct Item {
    PyObject* key;
    PyObject* value;  // null: not ours, may be anything
  };
  // Of the state: its items, where it is a dict, end where those of the next one begin.
  struct Entry {
    PyObject* key;
    PyObject* value;
    size_t first_item;
  };

  // A Python number of state, such as a step count, and the tensor an op sees in its place.
  struct Number {
    py::object key;
    Tensor tensor;
    double value = 0.0;  // when the step began
  };

  static constexpr size_t kParams = 0, kGrads = 1, kFirstState = 2;
  static constexpr int64_t kAhead = 8;  // entries of the state

  void add_call(const py::tuple& spec, const py::list& param_groups, const py::dict& state, const py::dict& averages) {
    const auto group = py::cast<size_t>(spec[0]);
    const auto params = params_of(param_groups[group]);
    const auto keys = py::cast<py::tuple>(spec[2]);
    TORCH_CHECK(keys.size() + kFirstState == op_->lists(), "optim_ext: ", keys.size(),
                " state keys given, the op takes ", op_->lists() - kFirstState);
    // One call per device, and per occurrence of a parameter that is in the group more than once: torch updates it that
    // many times in turn. Those that are averaged make a call of their own.
    std::map<std::tuple<std::string, int, bool>, size_t> call_of;
    std::unordered_map<PyObject*, int> occurrences;
    for (const auto& index : spec[1]) {
      const auto i = py::cast<int64_t>(index);
      const py::object param = params[i];
      TORCH_CHECK_TYPE(is_tensor(param.ptr()), describe(group, i, param_groups), " is a ",
                       Py_TYPE(param.ptr())->tp_name, ", expected a tensor");
      const Tensor& tensor = THPVariable_Unpack(param.ptr());
      TORCH_CHECK(!tensor.is_conj(), describe(group, i, param_groups),
                  " is a lazy conjugate view, expected a tensor of its own; call resolve_conj() on it");
      const bool averaged = averages.contains(param);
      const auto place = std::make_tuple(tensor.device().str(), occurrences[param.ptr()]++, averaged);
      auto found = call_of.find(place);
      if (found == call_of.end()) {
        found = call_of.emplace(place, calls_.size()).first;
        calls_.push_back({group,
                          tensor.device(),
                          {},
                          std::vector<PythonTensors>(op_->lists()),
                          py::cast<bool>(spec[3]),
                          py::cast<bool>(spec[4]),
                          {},
                          {},
                          {}});
        for (const auto& key : keys) calls_.back().keys.push_back(py::cast<std::string>(py::str(key)));
        source_.push_back(spec_count_);
      }
      PlannedCall& call = calls_[found->second];
      call.indices.push_back(i);
      call.lists[kParams].add(param.ptr());
      if (averaged) call.averages.add(py::object(averages[param]).ptr());
      PyObject* const entry = PyDict_GetItemWithError(state.ptr(), param.ptr());
      if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
      bool ready = true;
      for (size_t k = 0; k < keys.size(); ++k) {
        if (keys[k].is_none()) continue;
        PyObject* const value =
            entry && PyDict_Check(entry) ? PyDict_GetItemWithError(entry, py::object(keys[k]).ptr()) : nullptr;
        if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
        const bool is_number = value != nullptr && number_keys_.contains(keys[k]);
        TORCH_CHECK(!is_number || number_of(value), describe(group, i, param_groups), ": its state '",
                    std::string(py::str(py::object(keys[k]))), "' is ", std::string(py::repr(value)),
                    ", expected a number");
        const bool there = value != nullptr && (is_number || THPVariable_Check(value));
        // The dispatcher would take a call with one of these for one that only asks for shapes.
        TORCH_CHECK(!there || is_number || !THPVariable_Unpack(value).is_meta() || tensor.is_meta(),
                    describe(group, i, param_groups), ": its state '", std::string(py::str(py::object(keys[k]))),
                    "' is on meta, expected ", tensor.device());
        if (is_number) {
          call.lists[kFirstState + k].add_own(tensor_of_number(entry, k, keys[k]));
        } else {
          call.lists[kFirstState + k].add(there ? value : nullptr);
        }
        if (there && !is_number) ours_.emplace(value, true);
        const bool may_lack = partial_.contains(keys[k]);
        if (may_lack) call.partial.insert(kFirstState + k);
        ready &= there || may_lack;
      }
      call.ready.push_back(ready);
    }
    ++spec_count_;
  }

  // The same one wherever a parameter occurs more than once.
  const Tensor& tensor_of_number(PyObject* entry, size_t k, const py::object& key) {
    Number& number = numbers_[{entry, k}];
    if (!number.tensor.defined()) number = {key, at::zeros({}, at::kDouble)};
    return number.tensor;
  }

  // False where one is no longer a number.
  bool read_numbers() {
    for (auto& [place, number] : numbers_) {
      PyObject* const value = PyDict_GetItemWithError(place.first, number.key.ptr());
      const std::optional<double> found = value ? number_of(value) : std::nullopt;
      if (!found) return false;
      number.value = *number.tensor.mutable_data_ptr<double>() = *found;
    }
    return true;
  }

  static std::optional<double> number_of(PyObject* value) {
    const py::object as_float = py::reinterpret_steal<py::object>(PyNumber_Float(value));
    if (as_float) return PyFloat_AS_DOUBLE(as_float.ptr());
    PyErr_Clear();
    return std::nullopt;
  }

  void write_numbers() {
    for (const auto& [place, number] : numbers_) {
      const double value = *number.tensor.const_data_ptr<double>();
      if (value == number.value) continue;
      const py::object as_int = py::reinterpret_steal<py::object>(PyLong_FromDouble(value));
      if (!as_int || PyDict_SetItem(place.first, number.key.ptr(), as_int.ptr()) < 0) throw py::error_already_set();
    }
  }

  void remember_state(const py::dict& state) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
      entries_.push_back({key, value, items_.size()});
      if (!PyDict_Check(value)) continue;
      PyObject *name, *item;
      for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &item);)
        items_.push_back({name, ours_.count(item) ? item : nullptr});
    }
    ours_.clear();
  }

  bool is_current(const py::object& state, const py::object& param_groups) const {
    if (!PyDict_Check(state.ptr()) || !PyList_Check(param_groups.ptr())) return false;
    if (static_cast<size_t>(PyList_GET_SIZE(param_groups.ptr())) != groups_.size()) return false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
      PyObject* const params = PyDict_Check(group) ? PyDict_GetItemString(group, "params") : nullptr;
      if (!params || !(PyList_Check(params) || PyTuple_Check(params)) ||
          static_cast<size_t>(PySequence_Fast_GET_SIZE(params)) != groups_[g].size())
        return false;
      for (size_t i = 0; i < groups_[g].size(); ++i) {
        if (PySequence_Fast_GET_ITEM(params, i) != groups_[g][i]) return false;
      }
    }
    return state_is_current(state);
  }

  // The caller holds the GIL, which the threads can do without: they only read.
  bool state_is_current(const py::object& state) const {
    if (static_cast<size_t>(PyDict_Size(state.ptr())) != entries_.size()) return false;
    PyObject *key, *value;
    auto entry = entries_.begin();
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value); ++entry) {
      if (key != entry->key || value != entry->value) return false;
    }
    std::atomic<bool> same = true;
    const at::Device device = calls_.empty() ? at::Device(at::kCPU) : calls_[0].device;
    over_tensors(device, static_cast<int64_t>(entries_.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i + 2 * kAhead < end) __builtin_prefetch(entries_[i + 2 * kAhead].value);
        if (i + kAhead < end && PyDict_Check(entries_[i + kAhead].value)) fetch_items(entries_[i + kAhead].value);
        if (!is_unchanged(i)) {
          same = false;
          return;
        }
      }
    });
    return same;
  }

  bool is_unchanged(size_t i) const {
    PyObject* const value = entries_[i].value;
    const size_t end = i + 1 < entries_.size() ? entries_[i + 1].first_item : items_.size();
    if (!PyDict_Check(value)) return entries_[i].first_item == end;  // not a dict that has died, at its address
    auto expected = items_.begin() + static_cast<int64_t>(entries_[i].first_item);
    if (static_cast<size_t>(PyDict_GET_SIZE(value)) != end - entries_[i].first_item) return false;
    PyObject *name, *item;
    for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &item); ++expected) {
      if (name != expected->key || (expected->value && item != expected->value)) return false;
    }
    return true;
  }

  // Asks for what is_unchanged() will read of a dict.
  static void fetch_items(PyObject* dict) {
    const auto* const keys = reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(dict)->ma_keys);
    __builtin_prefetch(keys);
    __builtin_prefetch(keys + 64);
  }

  // Takes the tensors and their gradients. False where a plan cannot serve: state still to be made, a gradient or
  // parameter of another kind.
  static bool gather(const PlannedCall& call, Gathered& out) {
    std::vector<const PythonTensors*> lists;
    for (const PythonTensors& list : call.lists) lists.push_back(&list);
    lists.push_back(&call.averages);
    if (!out.taken.take(std::move(lists))) return false;
    const TensorList params = out.taken.get(kParams);
    const Tensor& first = params[0].grad();
    if (first.defined() && first.layout() == at::kStrided && !is_intercepted(first) && !first.is_conj() &&
        !first.is_neg() && !is_intercepted(params[0])) {
      const c10::DispatchKeySet keys = params[0].key_set();
      const auto usual = [&](int64_t i) {
        const c10::TensorImpl* const param = params[i].unsafeGetTensorImpl();
        return call.ready[i] && param->key_set() == keys && param->device() == call.device ? param : nullptr;
      };
      if (take_usual(first, static_cast<int64_t>(params.size()), usual, out.grads)) return true;
    }
    out.grads.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      const Tensor& grad = params[i].grad();
      if (!grad.defined()) {
        if (out.all) {
          out.all = false;
          for (size_t j = 0; j < i; ++j) out.members.push_back(static_cast<int64_t>(j));
        }
        out.idle.push_back(static_cast<int64_t>(i));
        continue;
      }
      const bool sparse = call.takes_sparse && grad.is_sparse() && !grad.is_complex() && params[i].is_contiguous();
      if (sparse && call.is_averaged()) return false;  // only some rows are stepped, but all are averaged
      if (!call.ready[i] || !(sparse || (call.takes_dense && grad.layout() == at::kStrided)) || is_intercepted(grad) ||
          params[i].device() != call.device || is_intercepted(params[i]))
        return false;
      out.grads.push_back(grad.is_conj() || grad.is_neg() ? grad.resolve_conj().resolve_neg() : grad);
      if (!out.all) out.members.push_back(static_cast<int64_t>(i));
    }
    return true;
  }

  void run_all(const std::vector<Gathered>& gathered, const py::list& hypers, const CommonTensors& common,
               const py::object& param_groups, bool check_only) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (size_t c = 0; c < calls_.size(); ++c) {
      if (!gathered[c].grads.empty())
        run_one(calls_[c], gathered[c], PyList_GET_ITEM(hypers.ptr(), source_[c]), common, param_groups, check_only);
      if (common.average_weight && calls_[c].is_averaged() && !gathered[c].all)
        average_idle(calls_[c], gathered[c], common, param_groups, check_only);
    }
  }

  // Parameters without a gradient stay as they are, but their averages still move towards them.
  void average_idle(const PlannedCall& call, const Gathered& gathered, const CommonTensors& common,
                    const py::object& param_groups, bool check_only) const {
    std::vector<Tensor> averages, params;
    for (const int64_t i : gathered.idle) {
      averages.push_back(gathered.taken.get(call.lists.size())[i]);
      params.push_back(gathered.taken.get(kParams)[i]);
    }
    naming(call, gathered.idle, param_groups,
           [&] { run_average(averages, params, *common.average_weight, common.found_inf, check_only); });
  }

  void run_one(const PlannedCall& call, const Gathered& gathered, PyObject* hypers, const CommonTensors& common,
               const py::object& param_groups, bool check_only) const {
    TORCH_CHECK(PyTuple_Check(hypers) && static_cast<size_t>(PyTuple_GET_SIZE(hypers)) == op_->hypers(),
                "optim_ext: group ", call.group, " gives ", PyObject_Length(hypers), " hyper-parameters, its op takes ",
                op_->hypers());
    std::vector<TensorList> lists(op_->lists());
    std::vector<std::vector<Tensor>> subsets(gathered.all ? 0 : op_->lists());
    const auto taking_part = [&](TensorList all) {
      std::vector<Tensor> subset;
      for (const int64_t member : gathered.members) subset.push_back(all[member]);
      return subset;
    };
    for (size_t k = 0; k < lists.size(); ++k) {
      const TensorList all = gathered.taken.get(k);
      if (call.partial.contains(k)) {
        subsets.resize(lists.size());
        subsets[k] = gathered.all ? all.vec() : taking_part(all);
        std::erase_if(subsets[k], [](const Tensor& tensor) { return !tensor.defined(); });
        lists[k] = subsets[k];
      } else if (k == kGrads) {
        lists[k] = gathered.grads;
      } else if (gathered.all) {
        lists[k] = all;
      } else {
        if (!all.empty()) subsets[k] = taking_part(all);
        lists[k] = subsets[k];
      }
    }
    CommonTensors here{moved_to(call.device, common.grad_scale),
                       moved_to(call.device, common.found_inf),
                       moved_to(call.device, common.grad_factor),
                       {},
                       std::nullopt};
    std::vector<Tensor> averages;
    if (common.average_weight && call.is_averaged()) {
      const TensorList all = gathered.taken.get(call.lists.size());
      if (!gathered.all) averages = taking_part(all);
      here.averages = gathered.all ? all : averages;
      here.average_weight = weight_for(call.device, *common.average_weight);
    }
    naming(call, gathered.members, param_groups, [&] { op_->run(lists, hypers, here, check_only); });
  }

  // Runs the body; what it refuses by index is told with the parameter's name, and a bad hyper-parameter with its
  // group. members: into the call's lists, all of them if empty.
  template <class Body>
  void naming(const PlannedCall& call, const std::vector<int64_t>& members, const py::object& param_groups,
              const Body& body) const {
    const RemembersCalls remembers(*call.known);
    try {
      body();
    } catch (const BadHyper& bad) {
      throw BadHyper("group " + std::to_string(call.group) + ": " + bad.what_without_backtrace(), bad.divides);
    } catch (const BadInput& bad) {
      if (bad.index < 0) throw;
      const int64_t index = call.indices[members.empty() ? bad.index : members[bad.index]];
      throw std::runtime_error(describe(call.group, index, param_groups) + ": " + name_of(call, bad.list) + " " +
                               bad.problem);
    } catch (const c10::ValueError& bad) {
      TORCH_CHECK_VALUE(false, "group ", call.group, ": ", bad.what_without_backtrace());
    }
  }

  // A list of the op as users know what is in it: by the key under which a parameter's state has it.
  std::string name_of(const PlannedCall& call, const std::string& list) const {
    for (size_t k = 0; k < call.keys.size(); ++k) {
      if (op_->list_name(kFirstState + k) == list) return call.keys[k];
    }
    return list;
  }

  std::shared_ptr<PlannedOp> op_;
  std::vector<std::vector<PyObject*>> groups_;  // identities
  const py::set partial_, number_keys_;
  std::map<std::pair<PyObject*, size_t>, Number> numbers_;  // by the state's dict they are in, and the op's list
  std::vector<PlannedCall> calls_;
  std::vector<size_t> source_;  // which tuple of hyper-parameters a call takes
  size_t spec_count_ = 0;
  std::vector<Entry> entries_;
  std::vector<Item> items_;
  std::unordered_map<PyObject*, bool> ours_;
};

py::dict table_of(const StepOp& op) {
  static constexpr const char* kKinds[] = {"number", "tensor", "flag", "whole"};
  static constexpr const char* kRoles[] = {"operand", "scalar", "partial", "steps"};
  py::list lists, hypers;
  for (const rules::List& list : op.lists)
    lists.append(py::make_tuple(list.name, list.key, kRoles[static_cast<int>(list.role)]));
  for (const HyperInfo& hyper : op.hypers) {
    hypers.append(py::make_tuple(hyper.name, kKinds[static_cast<int>(hyper.kind)], hyper.key,
                                 hyper.index < 0 ? py::object(py::none()) : py::object(py::int_(hyper.index))));
  }
  py::dict table;
  table["lists"] = lists;
  table["hypers"] = hypers;
  table["takes_sparse"] = op.takes_sparse;
  return table;
}

}  // namespace

void bind_plan(py::module_& m) {
  std::map<std::string, std::shared_ptr<PlannedOp>> ops;
  for (const StepOp* op : StepOp::all()) ops.emplace(op->name, std::make_shared<PlannedOp>(*op));
  m.def(
      "step_ops",
      [] {
        py::dict tables;
        for (const StepOp* op : StepOp::all()) tables[op->name] = table_of(*op);
        return tables;
      },
      "The ops an optimizer steps with: their lists of tensors as (argument, key of state, role), and their "
      "hyper-parameters as "
      "(argument, kind, option, index in the tuple there or None).");
  py::class_<Plan>(m, "Plan", py::dynamic_attr())
      .def(py::init([ops](const std::string& op, const py::list& param_groups, const py::dict& state,
                          const py::list& calls, const py::dict& averages, const py::set& partial,
                          const py::set& numbers) {
             return std::make_unique<Plan>(ops.at(op), param_groups, state, calls, averages, partial, numbers);
           }),
           py::arg("op"), py::arg("param_groups"), py::arg("state"), py::arg("calls"), py::arg("averages") = py::dict(),
           py::arg("partial") = py::set(), py::arg("numbers") = py::set())
      .def(
          "step",
          [](Plan& plan, const py::object& state, const py::object& param_groups, const py::list& hypers,
             const py::object& grad_scale, const py::object& found_inf, const py::object& grad_factor,
             const py::object& average_weight, bool check_only) {
            return as_torch_raises([&] {
              return plan.step(state, param_groups, hypers, grad_scale, found_inf, grad_factor, average_weight,
                               check_only);
            });
          },
          py::arg("state"), py::arg("param_groups"), py::arg("hypers"), py::arg("grad_scale"), py::arg("found_inf"),
          py::arg("grad_factor"), py::arg("average_weight") = py::none(), py::arg("check_only") = false);
}

}  // namespace optim_ext::ops
