// The table of contents: the ops that do not step (those that do register themselves, step_op.h), with their schemas
// and the dispatch keys they are registered for, and the Python module.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "host/average_plan.h"
#include "host/grad_marks.h"
#include "host/gradients.h"
#include "host/lbfgs_python.h"
#include "host/local_view.h"
#include "host/op_tables.h"
#include "host/open_rules.h"
#include "host/plan.h"
#include "host/whole_parts.h"
#include "kernels/rule_names.h"
#include "ops/drivers.h"
#include "ops/lbfgs_op.h"
#include "ops/ops.h"

using namespace optim_ext::ops;

// X(op, schema): running averages brought up to date; ops on gradients alone, which return something new on the device
// of their arguments; the parts of an L-BFGS iteration, which works on flat vectors.
#define FOR_EACH_OP(X)                                                                                             \
  X(average_, "(Tensor(a!)[] averages, Tensor[] params, *, Tensor weight, Tensor? found_inf=None) -> ()")          \
  X(grad_norm,                                                                                                     \
    "(Tensor[] grads, *, float norm_type=2.0, float? max_norm=None, bool skip_nonfinite=False, "                   \
    "float? skip_above=None, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(a!)? skips=None) -> "         \
    "(Tensor norm, Tensor grad_factor, Tensor found_inf)")                                                         \
  X(clip_, "(Tensor(a!)[] tensors, *, float? limit=None, Tensor? factor=None) -> ()")                              \
  X(norms, "(Tensor[] tensors, *, float norm_type=2.0) -> Tensor")                                                 \
  X(count_nonfinite, "(Tensor[] tensors) -> Tensor")                                                               \
  X(lbfgs_gather_, "(Tensor(a!) flat, Tensor[] tensors, int[] offsets, *, bool negate=False) -> ()")               \
  X(lbfgs_displace_, "(Tensor(a!)[] params, Tensor d, *, Tensor? origin=None, float t) -> ()")                     \
  X(lbfgs_norms, "(Tensor vector, Tensor? other=None, *, int? counted=None) -> Tensor")                            \
  X(lbfgs_dots,                                                                                                    \
    "(Tensor vector, Tensor[] old_dirs, Tensor[] old_stps, *, Tensor? metric=None, int? counted=None) -> Tensor")  \
  X(lbfgs_pair_,                                                                                                   \
    "(Tensor(a!) y, Tensor(b!) s, Tensor grad, Tensor prev_grad, Tensor d, Tensor[] old_dirs, Tensor[] old_stps, " \
    "*, Tensor? metric=None, float t, float grad_weight=1.0, float prev_weight=1.0, int? counted=None) -> Tensor") \
  X(lbfgs_combine_,                                                                                                \
    "(Tensor(a!) d, Tensor grad, Tensor[] old_dirs, Tensor[] old_stps, *, Tensor coefficients, "                   \
    "Tensor? metric=None, int? counted=None) -> Tensor")

TORCH_LIBRARY(optim_ext, m) {
#define DEFINE(op, schema) m.def(#op schema);
  FOR_EACH_OP(DEFINE)
#undef DEFINE
}

TORCH_LIBRARY_IMPL(optim_ext, CPU, m) {
#define IMPLEMENT(op, schema) m.impl(#op, &op<CpuDriver>);
  FOR_EACH_OP(IMPLEMENT)
#undef IMPLEMENT
}

#if defined(OPTIM_EXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(optim_ext, CUDA, m) {
#define IMPLEMENT(op, schema) m.impl(#op, &op<CudaDriver>);
  FOR_EACH_OP(IMPLEMENT)
#undef IMPLEMENT
}
#endif

PYBIND11_MODULE(_C, m) {
  bind_op_tables(m);
  bind_open_rules(m);
  bind_plan(m);
  bind_average_plan(m);
  bind_gradients(m);
  bind_grad_marks(m);
  bind_lbfgs(m);
  bind_local_view(m);
  bind_whole_parts(m);
  m.def(
      "rules",
      [] {
        const auto names = optim_ext::rule_names();
        return std::vector<std::string>(names.begin(), names.end());
      },
      "The names of all rules, as C++ spells them.");
  m.def("isa", [] { return isa_name(current_isa()); }, "The instruction set the CPU kernels run with in this process.");
}
