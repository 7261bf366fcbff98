#include "gradients.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/square.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "../ops/ops.h"
#include "plan.h"

namespace optim_ext::ops {

namespace {

// Why no kernel can read `grad`; None if one can, or if it is bad input that the op itself refuses.
std::optional<std::string> unsupported_grad(const Tensor& grad, bool takes_sparse) {
  if (is_intercepted(grad)) return "it is a tensor subclass that intercepts its operations";
  if (grad.is_sparse()) {
    if (!takes_sparse) return "it is sparse";
    return grad.is_complex() ? std::optional<std::string>("it is sparse and complex") : std::nullopt;
  }
  if (grad.layout() != at::kStrided) return "its layout is not strided";
  return std::nullopt;
}

// Why no kernel of this build can update `tensor`; None if one can.
std::optional<std::string> unsupported(const Tensor& tensor) {
  if (auto problem = unsupported_grad(tensor, false)) return problem;
#if defined(OPTIM_EXT_WITH_CUDA)
  if (!tensor.is_cpu() && !tensor.is_cuda()) return "there is no kernel for device " + tensor.device().str();
#else
  if (tensor.is_cuda()) return "this build of optim_ext has no CUDA kernels (see python -m optim_ext)";
  if (!tensor.is_cpu()) return "there is no kernel for device " + tensor.device().str();
#endif
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
    case at::kComplexFloat:
    case at::kComplexDouble: break;
    default: return std::string("there is no kernel for dtype ") + c10::toString(tensor.scalar_type());
  }
  // A conjugate view is not torch's to handle: its code would fail on it with half of the list written. Plans refuse
  // it.
  if (tensor.is_neg() && !tensor.is_conj()) return "it is a lazy negative view";
  return std::nullopt;
}

using GradNorm = std::tuple<Tensor, Tensor, Tensor>;

GradNorm call_grad_norm(TensorList grads, double norm_type, std::optional<double> max_norm, bool skip_nonfinite,
                        std::optional<double> skip_above, const OptionalTensor& grad_scale,
                        const OptionalTensor& found_inf, const OptionalTensor& skips) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("optim_ext::grad_norm", "")
                             .typed<GradNorm(TensorList, double, std::optional<double>, bool, std::optional<double>,
                                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&)>();
  return op.call(grads, norm_type, max_norm, skip_nonfinite, skip_above, grad_scale, found_inf, skips);
}

// All gradients of a group, if they are of one kind, and of one a kernel can read as it is.
bool take_usual_of(const py::list& params, std::vector<Tensor>& grads) {
  const auto param = [&](int64_t i) -> const c10::TensorImpl* {
    PyObject* const object = PyList_GET_ITEM(params.ptr(), i);
    return is_tensor(object) ? THPVariable_Unpack(object).unsafeGetTensorImpl() : nullptr;
  };
  const auto count = static_cast<int64_t>(PyList_GET_SIZE(params.ptr()));
  if (count == 0 || param(0) == nullptr) return false;
  const Tensor& first = param(0)->grad();
  if (!first.defined() || first.is_conj() || first.is_neg() || unsupported(first)) return false;
  return take_usual(first, count, param, grads);
}

// The gradients of all groups by device, in order.
std::vector<std::pair<at::Device, std::vector<Tensor>>> gather(const py::object& param_groups) {
  std::vector<std::pair<at::Device, std::vector<Tensor>>> found;
  size_t g = 0;
  for (const py::handle group : param_groups) {
    const py::list params = params_of(group);
    const auto place_of = [&](at::Device device) -> std::vector<Tensor>& {
      auto place = std::find_if(found.begin(), found.end(), [&](const auto& of) { return of.first == device; });
      if (place == found.end()) place = found.insert(found.end(), {device, {}});
      return place->second;
    };
    if (std::vector<Tensor> usual; take_usual_of(params, usual)) {
      std::vector<Tensor>& all = place_of(usual[0].device());
      if (all.empty()) {
        all = std::move(usual);
      } else {
        std::move(usual.begin(), usual.end(), std::back_inserter(all));
      }
      ++g;
      continue;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
      PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
      TORCH_CHECK_TYPE(is_tensor(param), describe(g, i, param_groups), " is a ", Py_TYPE(param)->tp_name,
                       ", expected a tensor");
      Tensor grad = THPVariable_Unpack(param).grad();
      if (!grad.defined()) continue;
      if (grad.is_conj() || grad.is_neg()) grad = grad.resolve_conj().resolve_neg();
      if (grad.is_sparse() && !is_intercepted(grad)) grad = grad.coalesce()._values();
      if (const auto problem = unsupported(grad)) {
        throw std::runtime_error(describe(g, i, param_groups) + ": no native norm of its gradient: " + *problem +
                                 "; torch.nn.utils.clip_grad_norm_ may be able to clip it");
      }
      place_of(grad.device()).push_back(std::move(grad));
    }
    ++g;
  }
  return found;
}

// What the gradients of all groups contribute to a norm that has other contributions: the sum of their squares or of
// their magnitudes, or the largest of these; in double, on the device of the first.
Tensor unfinished_norm_of(const py::object& param_groups, double norm_type) {
  static const auto norms =
      c10::Dispatcher::singleton().findSchemaOrThrow("optim_ext::norms", "").typed<Tensor(TensorList, double)>();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto grads = gather(param_groups);
  const py::gil_scoped_release no_gil;
  std::vector<Tensor> parts;
  for (auto& [device, of_device] : grads) {
    const Tensor each = norms.call(of_device, norm_type);
    parts.push_back((norm_type == 2.0   ? each.square().sum()
                     : norm_type == 1.0 ? each.sum()
                                        : each.amax())
                        .to(grads[0].first));
    let_go(device, of_device);
  }
  if (parts.empty()) return at::zeros({}, at::kDouble);
  const Tensor all = at::stack(parts);
  return parts.size() == 1 ? parts[0] : std::isinf(norm_type) ? all.amax() : all.sum();
}

// The norm over several devices is the norm of their norms, taken on the first, as torch does.
GradNorm grad_norm_of(const py::object& param_groups, double norm_type, std::optional<double> max_norm,
                      bool skip_nonfinite, std::optional<double> skip_above, const py::object& grad_scale,
                      const py::object& found_inf, const py::object& skips) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto grads = gather(param_groups);
  std::vector<Tensor> norms;
  if (grads.empty()) norms.push_back(at::zeros({}));
  for (size_t d = 0; grads.size() > 1 && d < grads.size(); ++d) {
    norms.push_back(
        std::get<0>(call_grad_norm(grads[d].second, norm_type, {}, false, {}, {}, {}, {})).to(grads[0].first));
  }
  const auto& all = grads.size() == 1 ? grads[0].second : norms;
  const auto given = [&](const py::object& value) { return moved_to(all[0].device(), optional_tensor(value)); };
  const OptionalTensor scale = given(grad_scale), found = given(found_inf), count = optional_tensor(skips);
  const py::gil_scoped_release no_gil;
  auto result = call_grad_norm(all, norm_type, max_norm, skip_nonfinite, skip_above, scale, found, count);
  for (auto& [device, of_device] : grads) let_go(device, of_device);
  return result;
}

}  // namespace

// A tensor whose operations are intercepted (DTensor, FakeTensor, functorch): only the dispatcher knows what it is.
bool is_intercepted(const Tensor& tensor) {
  constexpr c10::DispatchKeySet intercepting({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchGradWrapper,
                                              c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Functionalize});
  return (tensor.key_set() & intercepting) != c10::DispatchKeySet();
}

bool is_tensor(PyObject* object) {
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

std::optional<Tensor> optional_tensor(const py::object& value) {
  if (value.is_none()) return std::nullopt;
  TORCH_CHECK_TYPE(is_tensor(value.ptr()), "optim_ext: expected a tensor or None, found a ",
                   Py_TYPE(value.ptr())->tp_name);
  return THPVariable_Unpack(value.ptr());
}

py::list params_of(const py::handle& group) { return py::list(py::object(group[py::str("params")])); }

std::string describe(size_t group, int64_t index, const py::object& param_groups) {
  const py::object options = param_groups[py::int_(group)];
  if (options.contains("param_names")) {
    const py::object names = options["param_names"];
    if (index < static_cast<int64_t>(py::len(names)))
      return "parameter '" + py::cast<std::string>(py::str(py::object(names[py::int_(index)]))) + "'";
  }
  return "parameter " + std::to_string(index) + " of group " + std::to_string(group);
}

void bind_gradients(py::module_& m) {
  m.def(
      "describe",
      [](const py::object& param_groups, size_t group, int64_t index) { return describe(group, index, param_groups); },
      py::arg("param_groups"), py::arg("group"), py::arg("index"),
      "A parameter as every message names it: by its name, or by its place.");
  m.def(
      "grad_norm",
      [](const py::object& param_groups, double norm_type, std::optional<double> max_norm, bool skip_nonfinite,
         std::optional<double> skip_above, const py::object& grad_scale, const py::object& found_inf,
         const py::object& skips) {
        const auto [norm, grad_factor, skip] = as_torch_raises([&] {
          return grad_norm_of(param_groups, norm_type, max_norm, skip_nonfinite, skip_above, grad_scale, found_inf,
                              skips);
        });
        const auto wrap = [](const Tensor& tensor) {
          return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
        };
        return py::make_tuple(wrap(norm), wrap(grad_factor), wrap(skip));
      },
      py::arg("param_groups"), py::arg("norm_type") = 2.0, py::arg("max_norm") = py::none(),
      py::arg("skip_nonfinite") = false, py::arg("skip_above") = py::none(), py::arg("grad_scale") = py::none(),
      py::arg("found_inf") = py::none(), py::arg("skips") = py::none(),
      "The op of the same name on the gradients of all groups.");
  m.def(
      "unfinished_grad_norm",
      [](const py::object& param_groups, double norm_type) {
        const Tensor found = as_torch_raises([&] { return unfinished_norm_of(param_groups, norm_type); });
        return py::reinterpret_steal<py::object>(THPVariable_Wrap(found));
      },
      py::arg("param_groups"), py::arg("norm_type"),
      "What the gradients of all groups contribute to a norm: a sum of squares or magnitudes, or the largest, in "
      "double.");
  m.def(
      "unsupported_grad",
      [](const py::object& grad, bool takes_sparse) {
        return unsupported_grad(*as_torch_raises([&] { return optional_tensor(grad); }), takes_sparse);
      },
      py::arg("grad"), py::arg("takes_sparse") = false, "Why no kernel can read the gradient, or None.");
  m.def(
      "unsupported",
      [](const py::object& tensor) { return unsupported(*as_torch_raises([&] { return optional_tensor(tensor); })); },
      "Why no kernel of this build can update the tensor, or None.");
}

}  // namespace optim_ext::ops
