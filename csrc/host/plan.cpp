#include "plan.h"

#include "../ops/run_average.h"
#include "fast_path.h"
#include "gradients.h"
#include "planned_call.h"
#include "planning.h"
#include "state_items.h"
#include "state_numbers.h"
#include "step_run.h"
#include "whole_parts.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

namespace optim_ext::ops {

namespace {

// A cache of what one optimizer hands to its op: where its parameters and state tensors are. The truth stays in Python:
// every step first walks param_groups and state and compares identities, and reports itself stale where anything was
// replaced. Between steps no tensor is held.
class Plan {
 public:
  // calls: one spec each, as Planning::add() takes it; the other arguments are those of Planning.
  Plan(const StepOp& op, const py::list& param_groups, const py::dict& state, const py::list& calls,
       const py::dict& averages, const py::set& partial, const py::set& numbers)
      : op_(op), groups_(py::len(param_groups)) {
    Planning planning(op, param_groups, state, averages, partial, numbers);
    for (const auto& item : calls) planning.add(py::cast<py::tuple>(item));
    calls_ = std::move(planning.calls);
    numbers_ = std::move(planning.numbers);
    spec_count_ = planning.specs;
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (const auto& param : params_of(param_groups[g])) groups_[g].push_back(param.ptr());
    }
    state_ = StateItems(state, planning.state_tensors);
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
  // hypers: one tuple per call, in the order of the op's schema. told: the fields of StepControls, without averages.
  // norms: of tensors of which this process has parts, or None (optim_ext/_step/whole_norms.py).
  bool step(const py::object& state, const py::object& param_groups, const py::list& hypers, const py::tuple& told,
            bool check_only, const py::object& norms) {
    std::vector<std::vector<HyperValue>> values = read_all_hypers(hypers);
    const StepControls controls = read_controls(told);
    if (!has_same_objects(state, param_groups)) return false;
    if (!check_only && step_as_before(values, controls, param_groups)) return options_will_hold();
    if (!state_is_current()) return false;
    const StepRun step(op_, controls, param_groups);
    std::vector<Gathered> gathered(calls_.size());
    size_t to_make = 0;
    for (size_t c = 0; c < calls_.size(); ++c) {
      if (!gather(calls_[c], gathered[c])) return false;
      to_make += !gathered[c].grads.empty();
      to_make += step.averages(calls_[c]) && !gathered[c].all;
    }
    if (!numbers_.read()) return false;
    for (size_t i = 0; i < spec_count_; ++i) {
      if (values[i].empty()) values[i] = numbers_of_[i].values();  // of its own, as other threads may step, too
    }
    if (norms.is_none() || check_only) {
      // One call checks itself before it writes. Several must all be sound before the first of them writes; and what a
      // mode in Python lets through comes back without its index.
      if (check_only || to_make > 1 || c10::impl::TorchDispatchModeTLS::any_modes_set())
        run_all(step, gathered, values, true);
      if (!check_only) run_and_remember(step, gathered, values, is_plain(controls, gathered));
    } else {
      py::cast<const WholeParts&>(norms.attr("parts")).step(norms.attr("total"), [&](bool first) {
        run_all(step, gathered, values, first);
      });
    }
    if (!check_only) {
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

  static StepControls read_controls(const py::tuple& told) {
    TORCH_CHECK(told.size() == 4, "optim_ext: a step is told four things, found ", told.size());
    return {.grad_scale = optional_tensor(told[0]),
            .found_inf = optional_tensor(told[1]),
            .grad_factor = optional_tensor(told[2]),
            .average_weight = told[3].is_none() ? OptionalTensor() : from_python<Tensor>(told[3].ptr())};
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
  bool step_as_before(const std::vector<std::vector<HyperValue>>& values, const StepControls& controls,
                      const py::object& param_groups) {
    const auto on_host = [](const OptionalTensor& tensor) { return !tensor || tensor->device().is_cpu(); };
    if (!fast_path_.is_known() || controls.grad_scale || controls.average_weight || !on_host(controls.found_inf) ||
        !on_host(controls.grad_factor) || !internals::calls_reach_kernels() || !fast_path_.look(state_))
      return false;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const StepRun step(op_, controls, param_groups);
    std::vector<Sweep> sweeps;
    sweeps.reserve(calls_.size());
    for (size_t c = 0; c < calls_.size(); ++c) {
      LocalView& view = fast_path_.view(c);
      Handover handover(Handover::Kind::offer, view.prepared());
      step.naming(calls_[c], {}, [&] {
        const std::vector<HyperValue>& own = values[calls_[c].spec];
        const std::vector<HyperValue>& hypers = own.empty() ? numbers_of_[calls_[c].spec].values() : own;
        op_.run(view.firsts(op_.lists.size()), hypers.data(), controls, /*check_only=*/true);
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

  // Whether a step is of the kind that the fast path takes.
  static bool is_plain(const StepControls& controls, const std::vector<Gathered>& gathered) {
    return !controls.grad_scale && !controls.average_weight &&
           std::all_of(gathered.begin(), gathered.end(), [](const Gathered& each) { return each.all; });
  }

  void run_and_remember(const StepRun& step, const std::vector<Gathered>& gathered,
                        const std::vector<std::vector<HyperValue>>& values, bool plain) {
    std::vector<Prepared> found(plain && fast_path_.should_remember() ? calls_.size() : 0);
    run_all(step, gathered, values, false, found.data());
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
  void run_all(const StepRun& step, const std::vector<Gathered>& gathered,
               const std::vector<std::vector<HyperValue>>& values, bool check_only, Prepared* found = nullptr) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (size_t c = 0; c < calls_.size(); ++c) {
      std::optional<Handover> handover;
      if (found != nullptr) handover.emplace(Handover::Kind::look, found[c]);
      step.run(calls_[c], gathered[c], values[calls_[c].spec], check_only);
    }
  }

  const StepOp& op_;
  std::vector<std::vector<PyObject*>> groups_;  // identities
  StateNumbers numbers_;
  std::vector<PlannedCall> calls_;
  size_t spec_count_ = 0;
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
  py::class_<Plan>(m, "Plan", py::dynamic_attr())
      .def(
          py::init([](const std::string& op, const py::list& param_groups, const py::dict& state, const py::list& calls,
                      const py::dict& averages, const py::set& partial, const py::set& numbers) {
            return std::make_unique<Plan>(StepOp::named(op), param_groups, state, calls, averages, partial, numbers);
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
             const py::tuple& controls, bool check_only, const py::object& norms) {
            return as_torch_raises([&] { return plan.step(state, param_groups, hypers, controls, check_only, norms); });
          },
          py::arg("state"), py::arg("param_groups"), py::arg("hypers"), py::arg("controls"),
          py::arg("check_only") = false, py::arg("norms") = py::none());
}

}  // namespace optim_ext::ops
