#include "plan.h"

#include "../ops/run_average.h"
#include "fast_path.h"
#include "gradients.h"
#include "planned_call.h"
#include "python_tensors.h"
#include "state_items.h"
#include "state_numbers.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <set>
#include <unordered_map>
#include <unordered_set>

namespace optim_ext::ops {

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
  Plan(const StepOp& op, const py::list& param_groups, const py::dict& state, const py::list& calls,
       const py::dict& averages, const py::set& partial, const py::set& numbers)
      : op_(op), groups_(py::len(param_groups)), partial_(partial), number_keys_(numbers) {
    for (const auto& item : calls) add_call(py::cast<py::tuple>(item), param_groups, state, averages);
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (const auto& param : params_of(param_groups[g])) groups_[g].push_back(param.ptr());
    }
    state_ = StateItems(state, ours_);
    ours_.clear();
    numbers_of_.assign(spec_count_, NumberHypers(op_));
    for (size_t i = 0; i < op_.hypers.size(); ++i) {
      if (op_.hypers[i].index < 0 && std::string("lr") == op_.hypers[i].key) rate_ = i;
    }
  }

  int64_t steps_as_before() const { return steps_as_before_; }

  // Notes the options that the hyper-parameters of the next step() will be taken from; names: those options that
  // matter.
  void remember_options(const py::list& param_groups, const py::object& names) {
    options_hold_ = false;
    if (py::len(param_groups) != groups_.size()) return;
    options_.resize(groups_.size());
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (options_[g].are_unchanged(PyList_GET_ITEM(param_groups.ptr(), g))) continue;
      if (!options_[g].remember(param_groups[g], names)) return options_.clear();
    }
  }

  // Takes the step again as the last one was, without controls, where nothing has changed but gradients of the same
  // kind, counts and rates that are numbers. False, with nothing written, where more has.
  bool repeat(const py::object& state, const py::object& param_groups) {
    if (!options_hold_ || !fast_path_.is_known() || !has_same_objects(state, param_groups)) return false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
      if (!options_[g].are_unchanged(group) || !read_rate(group, numbers_of_[g])) return false;
    }
    return step_as_before(std::vector<std::vector<HyperValue>>(spec_count_), {}, param_groups);
  }

  // Steps, or returns False without having written anything if the plan no longer describes the optimizer.
  // hypers: one tuple per call, in the order of the op's schema.
  bool step(const py::object& state, const py::object& param_groups, const py::list& hypers,
            const py::object& grad_scale, const py::object& found_inf, const py::object& grad_factor,
            const py::object& average_weight, bool check_only) {
    std::vector<std::vector<HyperValue>> values = read_all_hypers(hypers);
    const CommonTensors common{
        optional_tensor(grad_scale),
        optional_tensor(found_inf),
        optional_tensor(grad_factor),
        {},
        average_weight.is_none() ? OptionalTensor() : OptionalTensor(from_python<Tensor>(average_weight.ptr()))};
    if (!has_same_objects(state, param_groups)) return false;
    if (!check_only && step_as_before(values, common, param_groups)) return options_will_hold();
    if (!state_is_current()) return false;
    std::vector<Gathered> gathered(calls_.size());
    size_t to_make = 0;
    for (size_t c = 0; c < calls_.size(); ++c) {
      if (!gather(calls_[c], gathered[c])) return false;
      to_make += !gathered[c].grads.empty();
      to_make += common.average_weight && calls_[c].is_averaged() && !gathered[c].all;
    }
    if (!numbers_.read()) return false;
    // One call checks itself before it writes. Several must all be sound before the first of them writes; and what a
    // mode in Python lets through comes back without its index.
    for (size_t i = 0; i < spec_count_; ++i) {
      if (values[i].empty()) values[i] = numbers_of_[i].values();  // of its own, as other threads may step, too
    }
    if (check_only || to_make > 1 || c10::impl::TorchDispatchModeTLS::any_modes_set())
      run_all(gathered, values, common, param_groups, true);
    if (!check_only) {
      run_and_remember(gathered, values, common, param_groups);
      numbers_.write();
      options_will_hold();
    }
    {
      const py::gil_scoped_release no_gil;
      for (size_t c = 0; c < calls_.size(); ++c) let_go(calls_[c].device, gathered[c].grads);
    }
    return true;
  }

 private:
  static constexpr int64_t kAhead = 8;  // entries of the state

  void add_call(const py::tuple& spec, const py::list& param_groups, const py::dict& state, const py::dict& averages) {
    const auto group = py::cast<size_t>(spec[0]);
    const auto params = params_of(param_groups[group]);
    const auto keys = py::cast<py::tuple>(spec[2]);
    TORCH_CHECK(keys.size() + kFirstState == op_.lists.size(), "optim_ext: ", keys.size(),
                " state keys given, the op takes ", op_.lists.size() - kFirstState);
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
                          std::vector<PythonTensors>(op_.lists.size()),
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
        TORCH_CHECK(!is_number || StateNumbers::number_of(value), describe(group, i, param_groups), ": its state '",
                    std::string(py::str(py::object(keys[k]))), "' is ", std::string(py::repr(value)),
                    ", expected a number");
        const bool there = value != nullptr && (is_number || THPVariable_Check(value));
        // The dispatcher would take a call with one of these for one that only asks for shapes.
        TORCH_CHECK(!there || is_number || !THPVariable_Unpack(value).is_meta() || tensor.is_meta(),
                    describe(group, i, param_groups), ": its state '", std::string(py::str(py::object(keys[k]))),
                    "' is on meta, expected ", tensor.device());
        if (is_number) {
          call.lists[kFirstState + k].add_own(numbers_.tensor_of(entry, k, keys[k]));
        } else {
          call.lists[kFirstState + k].add(there ? value : nullptr);
        }
        if (there && !is_number) ours_.insert(value);
        const bool may_lack = partial_.contains(keys[k]);
        if (may_lack) call.partial.insert(kFirstState + k);
        ready &= there || may_lack;
      }
      call.ready.push_back(ready);
    }
    ++spec_count_;
  }

  // By spec; nothing for one whose hyper-parameters are all plain numbers: these are in numbers_of_.
  std::vector<std::vector<HyperValue>> read_all_hypers(const py::list& given) {
    TORCH_CHECK(py::len(given) == spec_count_, "optim_ext: one tuple of hyper-parameters per call is needed");
    std::vector<std::vector<HyperValue>> values(spec_count_);
    hypers_are_numbers_ = true;
    for (size_t i = 0; i < spec_count_; ++i) {
      PyObject* const tuple = PyList_GET_ITEM(given.ptr(), i);
      TORCH_CHECK(PyTuple_Check(tuple) && static_cast<size_t>(PyTuple_GET_SIZE(tuple)) == op_.hypers.size(),
                  "optim_ext: ", PyObject_Length(tuple), " hyper-parameters are given, the op takes ",
                  op_.hypers.size());
      if (numbers_of_[i].read(tuple)) continue;
      hypers_are_numbers_ = false;
      values[i] = read_hypers(op_, tuple);
    }
    return values;
  }

  bool options_will_hold() {
    options_hold_ = options_.size() == spec_count_ && hypers_are_numbers_;
    return true;
  }

  bool read_rate(PyObject* group, NumberHypers& values) const {
    static PyObject* const key = PyUnicode_InternFromString("lr");
    if (rate_ == kNoRate) return true;
    PyObject* const rate = PyDict_GetItem(group, key);
    if (rate == nullptr || !is_plain_number(rate)) return false;
    values.set(rate_, rate);
    return true;
  }

  // Whether groups, parameters and entries of the state are the same objects, so that they are alive.
  bool has_same_objects(const py::object& state, const py::object& param_groups) const {
    if (!PyDict_Check(state.ptr()) || !PyList_Check(param_groups.ptr())) return false;
    if (static_cast<size_t>(PyList_GET_SIZE(param_groups.ptr())) != groups_.size()) return false;
    static PyObject* const params_key = PyUnicode_InternFromString("params");
    for (size_t g = 0; g < groups_.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
      PyObject* const params = PyDict_Check(group) ? PyDict_GetItem(group, params_key) : nullptr;
      if (!params || !(PyList_Check(params) || PyTuple_Check(params)) ||
          static_cast<size_t>(PySequence_Fast_GET_SIZE(params)) != groups_[g].size() ||
          !std::equal(groups_[g].begin(), groups_[g].end(), PySequence_Fast_ITEMS(params)))
        return false;
    }
    return state_.has_same_entries(state.ptr());
  }

  // The same of what the entries hold. The caller holds the GIL, which the threads can do without: they only read.
  bool state_is_current() const {
    std::atomic<bool> same = true;
    const at::Device device = calls_.empty() ? at::Device(at::kCPU) : calls_[0].device;
    over_tensors(device, static_cast<int64_t>(state_.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i + 2 * kAhead < end) state_.fetch_entry(i + 2 * kAhead);
        if (i + kAhead < end) state_.fetch_items(i + kAhead);
        if (!state_.is_unchanged(i)) {
          same = false;
          return;
        }
      }
    });
    return same;
  }

  // Takes the step by what is remembered of one before. False where that does not hold any more, or does not do.
  // Between the first look and the last write no Python code runs.
  bool step_as_before(const std::vector<std::vector<HyperValue>>& values, const CommonTensors& common,
                      const py::object& param_groups) {
    const auto on_host = [](const OptionalTensor& tensor) { return !tensor || tensor->device().is_cpu(); };
    if (!fast_path_.is_known() || common.grad_scale || common.average_weight || !on_host(common.found_inf) ||
        !on_host(common.grad_factor) || !internals::calls_reach_kernels() || !fast_path_.look(state_))
      return false;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::vector<Sweep> sweeps;
    sweeps.reserve(calls_.size());
    for (size_t c = 0; c < calls_.size(); ++c) {
      LocalView& view = fast_path_.view(c);
      Handover handover(Handover::Kind::offer, view.prepared());
      naming(calls_[c], {}, param_groups, [&] {
        const std::vector<HyperValue>& own = values[source_[c]];
        const std::vector<HyperValue>& hypers = own.empty() ? numbers_of_[source_[c]].values() : own;
        op_.run(view.firsts(op_.lists.size()), hypers.data(), common, /*check_only=*/true);
      });
      if (!handover.taken) {
        fast_path_.forget();
        return false;
      }
      if (handover.sweep) sweeps.push_back(*handover.sweep);
    }
    if (!sweeps.empty()) fast_path_.step(sweeps);
    ++steps_as_before_;
    return true;
  }

  void run_and_remember(const std::vector<Gathered>& gathered, const std::vector<std::vector<HyperValue>>& values,
                        const CommonTensors& common, const py::object& param_groups) {
    const bool plain = !common.grad_scale && !common.average_weight &&
                       std::all_of(gathered.begin(), gathered.end(), [](const Gathered& each) { return each.all; });
    std::vector<Prepared> found(plain && fast_path_.should_remember() ? calls_.size() : 0);
    run_all(gathered, values, common, param_groups, false, found.data());
    if (found.empty()) return;
    const auto entries = state_.places();
    std::vector<LocalView> views(calls_.size());
    for (size_t c = 0; c < calls_.size(); ++c) {
      if (!views[c].remember(op_, calls_[c].lists, std::move(found[c]), entries)) views.clear();
      if (views.empty()) break;
    }
    fast_path_.remember(std::move(views));
  }

  // found: null, or where each call leaves what it finds.
  void run_all(const std::vector<Gathered>& gathered, const std::vector<std::vector<HyperValue>>& values,
               const CommonTensors& common, const py::object& param_groups, bool check_only,
               Prepared* found = nullptr) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (size_t c = 0; c < calls_.size(); ++c) {
      std::optional<Handover> handover;
      if (found != nullptr) handover.emplace(Handover::Kind::look, found[c]);
      if (!gathered[c].grads.empty())
        run_one(calls_[c], gathered[c], values[source_[c]], common, param_groups, check_only);
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

  void run_one(const PlannedCall& call, const Gathered& gathered, const std::vector<HyperValue>& hypers,
               const CommonTensors& common, const py::object& param_groups, bool check_only) const {
    std::vector<TensorList> lists(op_.lists.size());
    std::vector<std::vector<Tensor>> subsets(gathered.all ? 0 : lists.size());
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
    naming(call, gathered.members, param_groups, [&] {
      const py::gil_scoped_release no_gil;
      op_.run(lists, hypers.data(), here, check_only);
    });
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
      if (op_.lists[kFirstState + k].name == list) return call.keys[k];
    }
    return list;
  }

  const StepOp& op_;
  std::vector<std::vector<PyObject*>> groups_;  // identities
  const py::set partial_, number_keys_;
  StateNumbers numbers_;
  std::vector<PlannedCall> calls_;
  std::vector<size_t> source_;  // which tuple of hyper-parameters a call takes
  size_t spec_count_ = 0;
  std::unordered_set<PyObject*> ours_;  // state, while the plan is made
  StateItems state_;
  std::vector<NumberHypers> numbers_of_;  // by spec
  std::vector<GroupOptions> options_;     // of the groups; empty: not known
  bool hypers_are_numbers_ = false, options_hold_ = false;
  static constexpr size_t kNoRate = ~size_t{0};
  size_t rate_ = kNoRate;  // which of the hyper-parameters the learning rate is
  FastPath fast_path_;
  int64_t steps_as_before_ = 0;
};

}  // namespace

void bind_plan(py::module_& m) {
  std::map<std::string, const StepOp*> ops;
  for (const StepOp* op : StepOp::all()) ops.emplace(op->name, op);
  py::class_<Plan>(m, "Plan", py::dynamic_attr())
      .def(py::init([ops](const std::string& op, const py::list& param_groups, const py::dict& state,
                          const py::list& calls, const py::dict& averages, const py::set& partial,
                          const py::set& numbers) {
             return std::make_unique<Plan>(*ops.at(op), param_groups, state, calls, averages, partial, numbers);
           }),
           py::arg("op"), py::arg("param_groups"), py::arg("state"), py::arg("calls"), py::arg("averages") = py::dict(),
           py::arg("partial") = py::set(), py::arg("numbers") = py::set())
      .def_property_readonly("steps_as_before", &Plan::steps_as_before)
      .def("remember_options", &Plan::remember_options, py::arg("param_groups"), py::arg("names"))
      .def(
          "repeat",
          [](Plan& plan, const py::object& state, const py::object& param_groups) {
            return as_torch_raises([&] { return plan.repeat(state, param_groups); });
          },
          py::arg("state"), py::arg("param_groups"))
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
