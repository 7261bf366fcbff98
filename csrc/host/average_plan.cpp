#include "average_plan.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <string>

#include "../call/call.h"
#include "../ops/run_average.h"
#include "gradients.h"
#include "plan.h"
#include "python_tensors.h"

namespace optim_ext::ops {

namespace {

// The tensors of two module trees as their `_parameters`, `_buffers` and `_modules` hold them: compared by identity at
// every update, which takes a fraction of the time that walking modules in Python does.
class ModuleTree {
 public:
  // modules: the root, and every module below it after the one that holds it.
  explicit ModuleTree(const py::list& modules) {
    for (const auto& module : modules) {
      Node node{module.ptr(), {}};
      const py::object attributes = attributes_of(module.ptr());
      for (size_t k = 0; k < kDicts; ++k) {
        PyObject* const dict = dict_of(attributes, k);
        TORCH_CHECK_TYPE(dict != nullptr, "optim_ext: expected a torch.nn.Module");
        PyObject *key, *value;
        for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
          node.values[k].push_back(value);
        }
      }
      nodes_.push_back(std::move(node));
    }
  }

  bool is_current(const py::object& root) const {
    if (root.ptr() != nodes_.front().module) return false;
    // A module is looked into only after the one that holds it was found unchanged, so it is alive.
    return std::all_of(nodes_.begin(), nodes_.end(), [](const Node& node) { return is_unchanged(node); });
  }

 private:
  static constexpr size_t kDicts = 3, kModules = 2;
  struct Node {
    PyObject* module;
    std::array<std::vector<PyObject*>, kDicts> values;
  };

  static py::object attributes_of(PyObject* module) {
    PyObject* const attributes = PyObject_GenericGetDict(module, nullptr);
    if (attributes == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(attributes);
  }

  static PyObject* dict_of(const py::object& attributes, size_t k) {
    static PyObject* const names[] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
                                      PyUnicode_InternFromString("_modules")};
    PyObject* const dict = PyDict_GetItemWithError(attributes.ptr(), names[k]);
    return dict && PyDict_Check(dict) ? dict : nullptr;
  }

  static bool is_unchanged(const Node& node) {
    const py::object attributes = attributes_of(node.module);
    for (size_t k = 0; k < kDicts; ++k) {
      PyObject* const dict = dict_of(attributes, k);
      if (!dict || static_cast<size_t>(PyDict_GET_SIZE(dict)) != node.values[k].size()) return false;
      if (node.values[k].empty()) continue;
      PyObject *key, *value;
      auto expected = node.values[k].begin();
      for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++expected) {
        if (value != *expected) return false;
      }
    }
    return true;
  }

  std::vector<Node> nodes_;
};

// A cache of what an averaged model hands to average_. The truth stays in the modules.
class AveragePlan {
 public:
  // trees: the modules below each root that is_current() will be asked about. names: of the pairs, for messages.
  AveragePlan(const std::vector<py::list>& trees, std::vector<std::string> names, const py::list& averages,
              const py::list& params)
      : trees_(trees.begin(), trees.end()), names_(std::move(names)) {
    for (size_t i = 0; i < names_.size(); ++i) {
      PyObject* const average = py::object(averages[i]).ptr();
      const c10::Device device = THPVariable_Unpack(average).device();
      auto call = std::find_if(calls_.begin(), calls_.end(), [&](const PlannedCall& c) { return c.device == device; });
      if (call == calls_.end()) call = calls_.insert(calls_.end(), PlannedCall{device, {}, {}, {}});
      call->averages.add(average);
      call->params.add(py::object(params[i]).ptr());
      call->indices.push_back(i);
    }
  }

  bool is_current(const py::args& roots) const {
    if (roots.size() != trees_.size()) return false;
    for (size_t t = 0; t < trees_.size(); ++t) {
      if (!trees_[t].is_current(roots[t])) return false;
    }
    return std::all_of(calls_.begin(), calls_.end(), [](const PlannedCall& call) {
      const auto is_there = [&](const Tensor& average) { return average.device() == call.device; };
      return call.averages.are_all(is_there) && call.params.are_all([](const Tensor&) { return true; });
    });
  }

  // Brings all averages up to date, or, having written nothing, raises an error that names the parameter.
  void run(const py::object& weight, const py::object& found_inf, bool check_only) const {
    const Tensor number = from_python<Tensor>(weight.ptr());
    const OptionalTensor found = optional_tensor(found_inf);
    std::vector<TakenTensors> taken(calls_.size());
    for (size_t c = 0; c < calls_.size(); ++c) {
      const PlannedCall& call = calls_[c];
      TORCH_CHECK(taken[c].take({&call.averages, &call.params}),
                  "optim_ext: the averaged model changed while it was being updated");
    }
    const py::gil_scoped_release no_gil;
    if (check_only || calls_.size() > 1 || c10::impl::TorchDispatchModeTLS::any_modes_set())
      run_all(taken, number, found, true);
    if (!check_only) run_all(taken, number, found, false);
  }

 private:
  struct PlannedCall {
    c10::Device device;  // of the averages
    PythonTensors averages, params;
    std::vector<size_t> indices;  // into names_
    std::unique_ptr<KnownCalls> known = std::make_unique<KnownCalls>();
  };

  void run_all(const std::vector<TakenTensors>& taken, const Tensor& weight, const OptionalTensor& found_inf,
               bool check_only) const {
    for (size_t c = 0; c < calls_.size(); ++c) {
      const RemembersCalls remembers(*calls_[c].known);
      try {
        run_average(taken[c].get(0), taken[c].get(1), weight, found_inf, check_only);
      } catch (const BadInput& bad) {
        if (bad.index < 0) throw;
        throw std::runtime_error("'" + names_[calls_[c].indices[bad.index]] + "': " + bad.list + " " + bad.problem);
      }
    }
  }

  std::vector<ModuleTree> trees_;
  std::vector<std::string> names_;
  std::vector<PlannedCall> calls_;
};

}  // namespace

void bind_average_plan(py::module_& m) {
  py::class_<AveragePlan>(m, "AveragePlan")
      .def(py::init<const std::vector<py::list>&, std::vector<std::string>, const py::list&, const py::list&>(),
           py::arg("trees"), py::arg("names"), py::arg("averages"), py::arg("params"))
      .def("is_current", &AveragePlan::is_current)
      .def(
          "run",
          [](const AveragePlan& plan, const py::object& weight, const py::object& found_inf, bool check_only) {
            as_torch_raises([&] { plan.run(weight, found_inf, check_only); });
          },
          py::arg("weight"), py::arg("found_inf") = py::none(), py::arg("check_only") = false);
}

}  // namespace optim_ext::ops
