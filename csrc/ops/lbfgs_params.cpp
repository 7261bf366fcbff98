#include "lbfgs_params.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "gradients.h"
#include "plan.h"

namespace optim_ext::ops {

namespace {

const Tensor& param_at(const py::list& params, int64_t i) {
  return THPVariable_Unpack(PyList_GET_ITEM(params.ptr(), i));
}

// The parameters of a list, which owns them meanwhile. Copies of them could not be made on several threads: the second
// owner of a tensor has to tell its Python object, for which it needs the GIL.
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

void call_gather(const Tensor& flat, TensorList tensors, at::IntArrayRef offsets, bool negate) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("optim_ext::lbfgs_gather_", "")
                             .typed<void(const Tensor&, TensorList, at::IntArrayRef, bool)>();
  op.call(flat, tensors, offsets, negate);
}

void call_displace(TensorList params, const Tensor& d, const OptionalTensor& origin, double t) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("optim_ext::lbfgs_displace_", "")
                             .typed<void(TensorList, const Tensor&, const OptionalTensor&, double)>();
  op.call(params, d, origin, t);
}

void read(const Tensor& flat, const py::list& params, const std::vector<int64_t>& offsets) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Borrowed tensors(flat.device(), params);
  const py::gil_scoped_release no_gil;
  call_gather(flat, tensors.get(), offsets, false);
}

bool read_grads(const Tensor& flat, const py::list& params, const std::vector<int64_t>& offsets, bool negate) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto count = static_cast<int64_t>(params.size());
  const Tensor& first = param_at(params, 0).grad();
  const auto param = [&](int64_t i) { return param_at(params, i).unsafeGetTensorImpl(); };
  std::vector<Tensor> grads;
  if (!first.defined() || first.layout() != at::kStrided || !take_usual(first, count, param, grads)) return false;
  std::atomic<bool> fit = true;
  over_tensors(flat.device(), count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!grads[i].sizes().equals(param(i)->sizes())) fit = false;
    }
  });
  if (!fit) return false;
  const py::gil_scoped_release no_gil;
  call_gather(flat, grads, offsets, negate);
  let_go(flat.device(), grads);
  return true;
}

void move(const py::list& params, const Tensor& d, double t, const py::object& origin) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Borrowed tensors(d.device(), params);
  const OptionalTensor from = optional_tensor(origin);
  const py::gil_scoped_release no_gil;
  call_displace(tensors.get(), d, from, t);
}

}  // namespace

void bind_lbfgs_params(py::module_& m) {
  m.def(
      "lbfgs_read",
      [](const Tensor& flat, const py::list& params, const std::vector<int64_t>& offsets) {
        as_torch_raises([&] { read(flat, params, offsets); });
      },
      py::arg("flat"), py::arg("params"), py::arg("offsets"), "lbfgs_gather_ of the parameters.");
  m.def(
      "lbfgs_read_grads",
      [](const Tensor& flat, const py::list& params, const std::vector<int64_t>& offsets, bool negate) {
        return as_torch_raises([&] { return read_grads(flat, params, offsets, negate); });
      },
      py::arg("flat"), py::arg("params"), py::arg("offsets"), py::arg("negate"),
      "lbfgs_gather_ of the gradients; False, with nothing done, where one is missing or of another kind or shape.");
  m.def(
      "lbfgs_move",
      [](const py::list& params, const Tensor& d, double t, const py::object& origin) {
        as_torch_raises([&] { move(params, d, t, origin); });
      },
      py::arg("params"), py::arg("d"), py::arg("t"), py::arg("origin"), "lbfgs_displace_ of the parameters.");
}

}  // namespace optim_ext::ops
