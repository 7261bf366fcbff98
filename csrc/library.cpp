// The table of contents: every op with its schema, the dispatch keys it is registered for, and the Python module.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "ops/drivers.h"
#include "ops/lbfgs_op.h"
#include "ops/ops.h"
#include "ops/plan.h"

using namespace optim_ext::ops;

// Argument names are torch.optim's own. Gradients are marked as written because GradScaler's grad_scale unscales them
// in place, as torch's fused optimizers do; without it they are only read.
#define COMMON_ARGUMENTS "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_factor=None"
#define ADAM_ARGUMENTS                                                                                         \
  "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "                \
  "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, *, Tensor lr, Tensor beta1, Tensor beta2, "         \
  "float weight_decay, float eps, bool amsgrad, bool maximize, bool decoupled_weight_decay, " COMMON_ARGUMENTS \
  ") -> ()"

// X(op, function template, schema)
#define FOR_EACH_OP(X)                                                                                             \
  X(sgd_, sgd_,                                                                                                    \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, Tensor lr, float momentum, "      \
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool is_first_step, " COMMON_ARGUMENTS     \
    ") -> ()")                                                                                                     \
  X(adam_, adam_, ADAM_ARGUMENTS)                                                                                  \
  X(adamw_, adam_, ADAM_ARGUMENTS)                                                                                 \
  X(rmsprop_, rmsprop_,                                                                                            \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, Tensor(d!)[] momentum_buffers, "          \
    "Tensor(e!)[] grad_avgs, Tensor(f!)[] state_steps, *, Tensor lr, float alpha, float eps, float weight_decay, " \
    "float momentum, bool centered, bool maximize, " COMMON_ARGUMENTS ") -> ()")                                   \
  X(adagrad_, adagrad_,                                                                                            \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] state_sums, Tensor(d!)[] state_steps, *, Tensor lr, "  \
    "float lr_decay, float weight_decay, float eps, bool maximize, " COMMON_ARGUMENTS ") -> ()")

// X(op, schema): the parts of an L-BFGS iteration, which works on flat vectors.
#define FOR_EACH_LBFGS_OP(X)                                                                                       \
  X(lbfgs_gather_, "(Tensor(a!) flat, Tensor[] tensors, int[] offsets, *, bool negate=False) -> ()")               \
  X(lbfgs_displace_, "(Tensor(a!)[] params, Tensor d, *, Tensor? origin=None, float t) -> ()")                     \
  X(lbfgs_norms, "(Tensor vector, Tensor? other=None) -> Tensor")                                                  \
  X(lbfgs_dots, "(Tensor vector, Tensor[] old_dirs, Tensor[] old_stps, *, Tensor? metric=None) -> Tensor")         \
  X(lbfgs_pair_,                                                                                                   \
    "(Tensor(a!) y, Tensor(b!) s, Tensor grad, Tensor prev_grad, Tensor d, Tensor[] old_dirs, Tensor[] old_stps, " \
    "*, Tensor? metric=None, float t, float grad_weight=1.0, float prev_weight=1.0) -> Tensor")                    \
  X(lbfgs_combine_,                                                                                                \
    "(Tensor(a!) d, Tensor grad, Tensor[] old_dirs, Tensor[] old_stps, *, Tensor coefficients, "                   \
    "Tensor? metric=None) -> Tensor")

TORCH_LIBRARY(optim_ext, m) {
#define DEFINE(op, function, schema) m.def(#op schema);
  FOR_EACH_OP(DEFINE)
#undef DEFINE
#define DEFINE(op, schema) m.def(#op schema);
  FOR_EACH_LBFGS_OP(DEFINE)
#undef DEFINE
}

TORCH_LIBRARY_IMPL(optim_ext, CPU, m) {
#define IMPLEMENT(op, function, schema) m.impl(#op, &Op<#op, &function<CpuDriver>>::call);
  FOR_EACH_OP(IMPLEMENT)
#undef IMPLEMENT
#define IMPLEMENT(op, schema) m.impl(#op, &op<CpuDriver>);
  FOR_EACH_LBFGS_OP(IMPLEMENT)
#undef IMPLEMENT
}

#if defined(OPTIM_EXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(optim_ext, CUDA, m) {
#define IMPLEMENT(op, function, schema) m.impl(#op, &Op<#op, &function<CudaDriver>>::call);
  FOR_EACH_OP(IMPLEMENT)
#undef IMPLEMENT
#define IMPLEMENT(op, schema) m.impl(#op, &op<CudaDriver>);
  FOR_EACH_LBFGS_OP(IMPLEMENT)
#undef IMPLEMENT
}
#define PLAN_ENTRY(op, function, schema) \
  {#op, planned<&Op<#op, &function<CpuDriver>>::call, &Op<#op, &function<CudaDriver>>::call>("optim_ext::" #op)},
#else
#define PLAN_ENTRY(op, function, schema) {#op, planned<&Op<#op, &function<CpuDriver>>::call>("optim_ext::" #op)},
#endif

PYBIND11_MODULE(_C, m) {
  bind_plan(m, {FOR_EACH_OP(PLAN_ENTRY)});
#define NAME(op, function, schema) #op,
  m.def("ops", [] { return std::vector<std::string>{FOR_EACH_OP(NAME)}; }, "The names of all ops.");
#undef NAME
  py::class_<LbfgsGram>(m, "LbfgsGram")
      .def(py::init<>())
      .def("append_dots", [](LbfgsGram& gram, const Tensor& dots) { gram.append_dots(dots); })
      .def("push", [](LbfgsGram& gram, const Tensor& dots, int64_t history_size,
                      double least) { return gram.push(dots, history_size, least); })
      .def("coefficients", &LbfgsGram::coefficients)
      .def_property_readonly("count", &LbfgsGram::count)
      .def_property_readonly("h_diag", &LbfgsGram::h_diag)
      .def_property_readonly("curvatures", &LbfgsGram::curvatures)
      .def_property_readonly("alpha", &LbfgsGram::alpha);
  m.def("isa", [] { return isa_name(current_isa()); }, "The instruction set the CPU kernels run with in this process.");
}
