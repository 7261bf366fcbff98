#include "grad_marks.h"

#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace optim_ext::ops {

namespace py = pybind11;

namespace {

using at::Tensor;

// The gradients of an optimizer at one moment. Held weakly: their memory goes when their owners let go of it, but no
// other tensor can come to stand at the address of one that is marked, so that an address is an identity.
class GradMarks {
 public:
  explicit GradMarks(const py::object& param_groups) {
    each_grad(param_groups,
              [&](const Tensor& grad) { marks_.push_back({Weak(grad.getIntrusivePtr()), version_of(grad)}); });
  }

  // How often each gradient has been written in place since: the same number for all that are there now, or -1 where
  // they differ or one of them is not marked. None if there are gradients, but none that is marked. A marked one that
  // is not there any more does not matter otherwise.
  std::optional<int64_t> writes_since(const py::object& param_groups) const {
    std::optional<int64_t> writes;
    size_t known = 0, others = 0;
    bool alike = true;
    size_t next = 0;
    each_grad(param_groups, [&](const Tensor& grad) {
      const Mark* const mark = find(grad, next);
      if (mark == nullptr) {
        ++others;
        return;
      }
      ++known;
      const int64_t written = version_of(grad) - mark->version;
      alike &= !writes || *writes == written;
      writes = written;
    });
    if (known == 0) return others == 0 ? std::optional<int64_t>(0) : std::nullopt;
    return alike && others == 0 ? writes : -1;
  }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Mark {
    Weak grad;
    int64_t version;
  };

  // The mark of a gradient, or null. `next`: where it is if nothing has changed, moved on behind it.
  const Mark* find(const Tensor& grad, size_t& next) const {
    const c10::TensorImpl* const impl = grad.unsafeGetTensorImpl();
    const auto marks = [&](const Mark& mark) { return mark.grad._unsafe_get_target() == impl; };
    if (next < marks_.size() && marks(marks_[next])) return &marks_[next++];
    if (places_.empty()) {
      for (size_t i = 0; i < marks_.size(); ++i) places_.emplace(marks_[i].grad._unsafe_get_target(), i);
    }
    const auto found = places_.find(impl);
    if (found == places_.end()) return nullptr;
    next = found->second + 1;
    return &marks_[found->second];
  }

  static int64_t version_of(const Tensor& grad) { return grad.is_inference() ? 0 : grad._version(); }

  template <class Body>
  static void each_grad(const py::object& param_groups, const Body& body) {
    for (const py::handle group : param_groups) {
      for (const py::handle param : py::object(group[py::str("params")])) {
        if (!THPVariable_Check(param.ptr())) continue;
        if (const Tensor& grad = THPVariable_Unpack(param.ptr()).grad(); grad.defined()) body(grad);
      }
    }
  }

  std::vector<Mark> marks_;                                            // in the order of the groups
  mutable std::unordered_map<const c10::TensorImpl*, size_t> places_;  // made where another order is found
};

}  // namespace

void bind_grad_marks(py::module_& m) {
  py::class_<GradMarks>(m, "GradMarks", "The gradients of param_groups as they are now, held weakly.")
      .def(py::init<const py::object&>(), py::arg("param_groups"))
      .def("writes_since", &GradMarks::writes_since, py::arg("param_groups"),
           "How often all gradients have been written in place since; -1 if not all alike, None if they are others.");
}

}  // namespace optim_ext::ops
