#include "lbfgs_python.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "../ops/block_memory.h"
#include "../ops/lbfgs_history.h"
#include "gradients.h"
#include "plan.h"

namespace optim_ext::ops {

namespace {

const Tensor& param_at(const py::list& params, int64_t i) {
  return THPVariable_Unpack(PyList_GET_ITEM(params.ptr(), i));
}

// The parameters of a list, which owns them meanwhile. Copies of them could not be made on several threads: the second
// owner of a tensor has to tell its Python object, for which it needs the GIL. (A list given to an op from Python is
// converted tensor by tensor, which with many small parameters takes longer than the op.)
class Borrowed {
 public:
  Borrowed(at::Device device, const py::list& params) : tensors_(params.size()) {
    over_tensors(device, static_cast<int64_t>(tensors_.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) Traits::assignBorrow(tensors_[i], param_at(params, i));
    });
  }
  ~Borrowed() {
    for (Tensor& tensor : tensors_) Traits::destroyBorrow(tensor);
  }
  Borrowed(const Borrowed&) = delete;
  TensorList get() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<Tensor>;
  std::vector<Tensor> tensors_;
};

// The gradients that are there, dense, and where each begins among those of all parameters.
struct Gradients {
  std::vector<Tensor> tensors;
  std::vector<int64_t> offsets;
};

// One after the other: some are missing, sparse, of several kinds, or of another shape than their parameter, which is
// an error.
Gradients gradients_one_by_one(TensorList params, const std::vector<int64_t>& offsets) {
  Gradients found;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& grad = params[i].grad();
    if (!grad.defined()) continue;
    TORCH_CHECK(grad.sizes() == params[i].sizes(), "parameter ", i, " of LBFGS has shape ", params[i].sizes(),
                ", its gradient ", grad.sizes());
    found.tensors.push_back(grad.layout() == at::kStrided ? grad : grad.to_dense());
    found.offsets.push_back(offsets[i]);
  }
  return found;
}

Gradients gradients_of(TensorList params, const std::vector<int64_t>& offsets, at::Device device) {
  Gradients found;
  const auto count = static_cast<int64_t>(params.size());
  const Tensor& first = params[0].grad();
  const auto param = [&](int64_t i) { return params[i].unsafeGetTensorImpl(); };
  if (!first.defined() || first.layout() != at::kStrided || !take_usual(first, count, param, found.tensors))
    return gradients_one_by_one(params, offsets);
  std::atomic<bool> fit = true;
  over_tensors(device, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!found.tensors[i].sizes().equals(params[i].sizes())) fit = false;
    }
  });
  if (!fit) return gradients_one_by_one(params, offsets);
  found.offsets = offsets;
  return found;
}

// The vectors of a state, as the history computes with them: it may come from torch, or from a checkpoint of another
// dtype. Those of the last time are what they were.
class StateReader {
 public:
  StateReader(const py::object& state, int64_t numel, at::Device device)
      : state_(state), numel_(numel), device_(device) {}

  OptionalTensor vector(const char* key, at::ScalarType dtype) const {
    const py::object value = state_.attr("get")(key);
    return value.is_none() ? std::nullopt : OptionalTensor(fitting(value.ptr(), key, dtype));
  }

  // The newest `size` of a list.
  std::vector<Tensor> rows(const char* key, at::ScalarType dtype, int64_t size) const {
    std::vector<Tensor> rows;
    const py::object value = state_.attr("get")(key);
    if (value.is_none()) return rows;
    TORCH_CHECK_TYPE(PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()), "the state '", key,
                     "' of LBFGS is of type ", Py_TYPE(value.ptr())->tp_name, ", expected a list");
    const int64_t count = PySequence_Fast_GET_SIZE(value.ptr());
    rows.reserve(std::min(count, size));
    for (int64_t i = std::max<int64_t>(0, count - size); i < count; ++i)
      rows.push_back(fitting(PySequence_Fast_GET_ITEM(value.ptr(), i), key, dtype));
    return rows;
  }

 private:
  Tensor fitting(PyObject* value, const char* key, at::ScalarType dtype) const {
    TORCH_CHECK_TYPE(is_tensor(value), "the state '", key, "' of LBFGS holds an object of type ",
                     Py_TYPE(value)->tp_name, ", expected a tensor");
    const Tensor& tensor = THPVariable_Unpack(value);
    TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == numel_, "the state '", key, "' of LBFGS has shape ",
                tensor.sizes(), ", the parameters have ", numel_, " numbers; optimizer.state.clear() starts anew");
    const bool fits = tensor.scalar_type() == dtype && tensor.device() == device_ && tensor.is_contiguous();
    return fits ? tensor : tensor.to(device_, dtype).contiguous();
  }

  const py::object& state_;
  const int64_t numel_;
  const at::Device device_;
};

py::list as_list(const std::vector<Tensor>& tensors, int64_t size) {
  py::list list(size);
  for (int64_t i = 0; i < size; ++i) {
    const bool is_there = i < static_cast<int64_t>(tensors.size());
    PyList_SET_ITEM(list.ptr(), i, is_there ? THPVariable_Wrap(tensors[i]) : py::none().release().ptr());
  }
  return list;
}

py::list as_list(const std::vector<Tensor>& tensors) { return as_list(tensors, static_cast<int64_t>(tensors.size())); }

// The history with the places of the parameters in its vectors, which Python keeps: an object of C++ that owned them
// would hide a cycle of references (a hook on a parameter that has the optimizer) from Python's garbage collector.
class PythonHistory {
 public:
  PythonHistory(std::vector<int64_t> offsets, int64_t numel, at::ScalarType dtype, at::ScalarType row_dtype,
                at::Device device, int64_t history_size, OptionalTensor metric,
                std::vector<std::pair<int64_t, int64_t>> held, std::optional<int64_t> counted,
                std::vector<std::pair<std::string, int64_t>> groups)
      : history_(numel, dtype, row_dtype, device, history_size, std::move(metric), std::move(held),
                 counted ? std::optional(LbfgsParts{*counted, std::move(groups)}) : std::nullopt),
        offsets_(std::move(offsets)),
        numel_(numel),
        dtype_(dtype),
        row_dtype_(row_dtype),
        device_(device) {}

  LbfgsHistory& history() { return history_; }

  // What `work` makes of the parameters as tensors, while other threads of Python may run.
  template <class Work>
  auto with(const py::list& params, const Work& work) {
    const Borrowed tensors(device_, params);
    const py::gil_scoped_release no_gil;
    return work(tensors.get());
  }

  // Whether there is a direction.
  bool load(const py::object& state, int64_t history_size) {
    const StateReader reader(state, numel_, device_);
    const std::vector<Tensor> dirs = reader.rows("old_dirs", row_dtype_, history_size);
    const std::vector<Tensor> stps = reader.rows("old_stps", row_dtype_, history_size);
    TORCH_CHECK_VALUE(dirs.size() == stps.size(), "the state of LBFGS has ", dirs.size(), " old_dirs but ", stps.size(),
                      " old_stps");
    const OptionalTensor d = reader.vector("d", dtype_);
    const OptionalTensor prev_grad = d ? reader.vector("prev_flat_grad", dtype_) : std::nullopt;
    TORCH_CHECK_VALUE(!d || prev_grad, "the state of LBFGS has a direction 'd', but no 'prev_flat_grad'");
    const py::gil_scoped_release no_gil;  // processes may have to tell each other sums
    history_.take_up(dirs, stps, d, prev_grad);
    return d.has_value();
  }

  void save(const py::object& state, double t, const py::object& prev_loss, int64_t history_size, bool has_al) {
    history_.remember();
    if (!history_.d()) return;
    history_.update_numbers();
    state["d"] = *history_.d();
    state["t"] = t;
    state["old_dirs"] = as_list(history_.old_dirs());
    state["old_stps"] = as_list(history_.old_stps());
    state["ro"] = as_list(history_.ro());
    state["H_diag"] = history_.pairs() > 0 ? py::cast(history_.h_diag()) : py::cast(1);
    state["prev_flat_grad"] = *history_.prev_grad();
    state["prev_loss"] = prev_loss;
    if (has_al) state["al"] = as_list(history_.al(), std::max(history_size, history_.pairs()));
  }

  LbfgsEvaluation evaluate(const py::list& params, bool negate, bool along_direction, const OptionalTensor& loss) {
    const Borrowed tensors(device_, params);
    Gradients grads = gradients_of(tensors.get(), offsets_, device_);
    const py::gil_scoped_release no_gil;
    LbfgsEvaluation found = history_.evaluate(grads.tensors, grads.offsets, negate, along_direction, loss);
    let_go(device_, grads.tensors);
    return found;
  }

  LbfgsDeparture depart(const py::list& params, const LbfgsEvaluation& here, int64_t history_size,
                        const LbfgsStart& start) {
    return with(params, [&](TensorList tensors) { return history_.depart(here, tensors, history_size, start); });
  }

 private:
  LbfgsHistory history_;
  const std::vector<int64_t> offsets_;
  const int64_t numel_;
  const at::ScalarType dtype_, row_dtype_;
  const at::Device device_;
};

// Calls a method for Python: below autograd, and with torch's exceptions.
template <class... Arguments, class Method>
auto method(Method call) {
  return [call](PythonHistory& self, Arguments... arguments) {
    return as_torch_raises([&] {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return call(self, arguments...);
    });
  };
}

}  // namespace

void bind_lbfgs(py::module_& m) {
  m.def("vectors_of_one_block", &vectors_of_one_block,
        "Vectors on the CPU that lie one behind the other, in huge pages where the system has them.");
  py::class_<LbfgsEvaluation>(m, "LbfgsEvaluation")
      .def_property_readonly("grad", [](const LbfgsEvaluation& self) { return self.grad->tensor(); })
      .def_property_readonly("loss", [](const LbfgsEvaluation& self) { return self.loss; })
      .def_property_readonly("largest", [](const LbfgsEvaluation& self) { return self.norms.largest; })
      .def_property_readonly("total", [](const LbfgsEvaluation& self) { return self.norms.sum; })
      .def_property_readonly("product", [](const LbfgsEvaluation& self) { return self.norms.product; });
  using List = const py::list&;
  using Here = const LbfgsEvaluation&;
  py::class_<PythonHistory>(m, "LbfgsHistory")
      .def(py::init<std::vector<int64_t>, int64_t, at::ScalarType, at::ScalarType, at::Device, int64_t, OptionalTensor,
                    std::vector<std::pair<int64_t, int64_t>>, std::optional<int64_t>,
                    std::vector<std::pair<std::string, int64_t>>>(),
           py::arg("offsets"), py::arg("numel"), py::arg("dtype"), py::arg("row_dtype"), py::arg("device"),
           py::arg("history_size"), py::arg("metric"), py::arg("held"), py::arg("counted") = py::none(),
           py::arg("groups") = std::vector<std::pair<std::string, int64_t>>())
      .def("load", method<const py::object&, int64_t>([](auto& self, auto& state, int64_t size) {
             return self.load(state, size);
           }),
           py::arg("state"), py::arg("history_size"))
      .def("save",
           method<const py::object&, double, const py::object&, int64_t, bool>(
               [](auto& self, auto& state, double t, auto& prev_loss, int64_t size, bool has_al) {
                 self.save(state, t, prev_loss, size, has_al);
               }),
           py::arg("state"), py::arg("t"), py::arg("prev_loss"), py::arg("history_size"), py::arg("has_al"))
      .def("disown", [](PythonHistory& self) { self.history().disown(); })
      .def("evaluate",
           method<List, bool, bool, const OptionalTensor&>(
               [](auto& self, List params, bool negate, bool along_direction, const OptionalTensor& loss) {
                 return self.evaluate(params, negate, along_direction, loss);
               }),
           py::arg("params"), py::arg("negate"), py::arg("along_direction"), py::arg("loss") = py::none())
      .def("depart",
           method<List, Here, int64_t, bool, double, std::optional<double>, bool, std::optional<double>, double, bool,
                  const OptionalTensor&>([](auto& self, List params, Here here, int64_t size, bool anew,
                                            double last_length, std::optional<double> damping, bool keeps_origin,
                                            std::optional<double> t, double least_slope, bool only_if_finite,
                                            const OptionalTensor& is_held) {
             const LbfgsStart start{anew, last_length, damping, keeps_origin, t, least_slope, only_if_finite, is_held};
             const LbfgsDeparture departure = self.depart(params, here, size, start);
             return std::tuple(departure.largest, departure.slope, departure.moved);
           }),
           py::arg("params"), py::arg("here"), py::arg("history_size"), py::arg("anew"), py::arg("last_length"),
           py::arg("damping"), py::arg("keeps_origin"), py::arg("t"), py::arg("least_slope"), py::arg("only_if_finite"),
           py::arg("is_held") = py::none())
      .def("forget", [](PythonHistory& self) { self.history().forget(); })
      .def("stand_still", method<Here>([](auto& self, Here here) { self.history().stand_still(here); }),
           py::arg("here"))
      .def(
          "set_previous", [](PythonHistory& self, Here here) { self.history().set_previous(here); }, py::arg("here"))
      .def("move", method<List, double, bool>([](auto& self, List params, double t, bool from_origin) {
             self.with(params, [&](TensorList tensors) { self.history().move(tensors, t, from_origin); });
           }),
           py::arg("params"), py::arg("t"), py::arg("from_origin"))
      .def("move_to_origin", method<List>([](auto& self, List params) {
             self.with(params, [&](TensorList tensors) { self.history().move_to_origin(tensors); });
           }),
           py::arg("params"))
      .def("move_to", method<List, const Tensor&>([](auto& self, List params, const Tensor& point) {
             self.with(params, [&](TensorList tensors) { self.history().move_to(tensors, point); });
           }),
           py::arg("params"), py::arg("point"))
      .def("read", method<List>([](auto& self, List params) {
             return self.with(params, [&](TensorList tensors) { return self.history().read(tensors); });
           }),
           py::arg("params"))
      .def("note_best", method<List, Here>([](auto& self, List params, Here here) {
             self.with(params, [&](TensorList tensors) { self.history().note_best(here, tensors); });
           }),
           py::arg("params"), py::arg("here"))
      .def("go_to_best", method<List>([](auto& self, List params) {
             return self.with(params, [&](TensorList tensors) { return self.history().go_to_best(tensors); });
           }),
           py::arg("params"))
      .def_property_readonly("pairs", [](PythonHistory& self) { return self.history().pairs(); })
      .def_property_readonly("vectors", [](PythonHistory& self) { return self.history().vectors(); })
      .def_property_readonly("d", [](PythonHistory& self) { return self.history().d(); })
      .def_property_readonly("origin", [](PythonHistory& self) { return self.history().origin(); });
}

}  // namespace optim_ext::ops
