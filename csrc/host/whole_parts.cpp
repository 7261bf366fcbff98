#include "whole_parts.h"

#include <pybind11/stl.h>

namespace optim_ext::ops {

WholeParts::WholeParts(const py::list& params, const std::vector<int64_t>& numels) {
  TORCH_CHECK(py::len(params) == numels.size(), "optim_ext: expected as many numbers as parameters");
  for (size_t row = 0; row < numels.size(); ++row) {
    const at::Tensor part = *optional_tensor(params[row]);
    const auto numel = static_cast<double>(numels[row]) * (part.is_complex() ? 2.0 : 1.0);
    wholes_[part.unsafeGetTensorImpl()] = {static_cast<int64_t>(row), numel};
  }
}

void bind_whole_parts(py::module_& m) {
  py::class_<WholeParts>(m, "WholeParts", "Tensors that are parts of wholes of which a step takes norms.")
      .def(py::init<const py::list&, const std::vector<int64_t>&>(), py::arg("params"), py::arg("numels"));
  m.attr("MOST_NORMS") = kMaxScalars;  // that a rule takes of each parameter
}

}  // namespace optim_ext::ops
