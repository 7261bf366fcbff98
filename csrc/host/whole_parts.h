// Steps that take norms of tensors of which this process has parts.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

#include "../ops/whole_norms.h"
#include "gradients.h"

namespace optim_ext::ops {

namespace py = pybind11;

// The parameters that are parts, in the order of their rows.
class WholeParts {
 public:
  // numels: elements of the wholes.
  WholeParts(const py::list& params, const std::vector<int64_t>& numels);

  // run(check_only) makes all calls of a step; total(sums, refused) gives in Python what all processes together have
  // measured, for which each of them has to ask once a step, also one that refuses it.
  template <class Run>
  void step(const py::object& total, const Run& run) const {
    WholeNorms norms(wholes_);
    std::exception_ptr refusal;
    try {
      run(/*check_only=*/true);
    } catch (...) {
      refusal = std::current_exception();
    }
    const py::object totals = total(norms.sums(static_cast<int64_t>(wholes_.size()) + 1), refusal != nullptr);
    if (refusal) std::rethrow_exception(refusal);
    norms.know(*optional_tensor(totals));
    run(/*check_only=*/false);
  }

 private:
  WholesByPart wholes_;
};

// Adds the class WholeParts to the module.
void bind_whole_parts(py::module_& m);

}  // namespace optim_ext::ops
