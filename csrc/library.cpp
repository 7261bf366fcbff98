// The table of contents: every op with its schema, the dispatch keys it is registered for, and the Python module.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "ops/average_plan.h"
#include "ops/block_memory.h"
#include "ops/drivers.h"
#include "ops/grad_marks.h"
#include "ops/gradients.h"
#include "ops/lbfgs_op.h"
#include "ops/lbfgs_params.h"
#include "ops/ops.h"
#include "ops/plan.h"

using namespace optim_ext::ops;

// Argument names are torch.optim's own. Gradients are marked as written because GradScaler's grad_scale unscales them
// in place, as torch's fused optimizers do; without it they are only read.
#define COMMON_ARGUMENTS                                                        \
  "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_factor=None, " \
  "Tensor(y!)[] averages, Tensor? average_weight=None"
#define ADAM_ARGUMENTS                                                                                         \
  "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "                \
  "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, *, Tensor lr, Tensor beta1, Tensor beta2, "         \
  "float weight_decay, float eps, bool amsgrad, bool maximize, bool decoupled_weight_decay, " COMMON_ARGUMENTS \
  ") -> ()"

// X(op, function template, schema)
#define FOR_EACH_OP(X) \
  FOR_EACH_STEP_OP(X)  \
  X(average_, average_, "(Tensor(a!)[] averages, Tensor[] params, *, Tensor weight, Tensor? found_inf=None) -> ()")

#define FOR_EACH_STEP_OP(X)                                                                                            \
  X(sgd_, sgd_,                                                                                                        \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, Tensor lr, float momentum, "          \
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool is_first_step, " COMMON_ARGUMENTS         \
    ") -> ()")                                                                                                         \
  X(adam_, adam_, ADAM_ARGUMENTS)                                                                                      \
  X(adamw_, adam_, ADAM_ARGUMENTS)                                                                                     \
  X(rmsprop_, rmsprop_,                                                                                                \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, Tensor(d!)[] momentum_buffers, "              \
    "Tensor(e!)[] grad_avgs, Tensor(f!)[] state_steps, *, Tensor lr, float alpha, float eps, float weight_decay, "     \
    "float momentum, bool centered, bool maximize, " COMMON_ARGUMENTS ") -> ()")                                       \
  X(adagrad_, adagrad_,                                                                                                \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] state_sums, Tensor(d!)[] state_steps, *, Tensor lr, "      \
    "float lr_decay, float weight_decay, float eps, bool maximize, " COMMON_ARGUMENTS ") -> ()")                       \
  X(adadelta_, adadelta_,                                                                                              \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, Tensor(d!)[] acc_deltas, Tensor(e!)[] "       \
    "state_steps, *, Tensor lr, float rho, float eps, float weight_decay, bool maximize, " COMMON_ARGUMENTS ") -> ()") \
  X(adafactor_, adafactor_,                                                                                            \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] row_vars, Tensor(d!)[] col_vars, "                         \
    "Tensor(e!)[] variances, Tensor(f!)[] state_steps, *, Tensor lr, float beta2_decay, float eps1, float eps2, "      \
    "float d, float weight_decay, bool maximize, " COMMON_ARGUMENTS ") -> ()")                                         \
  X(adamax_, adamax_,                                                                                                  \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_infs, Tensor(e!)[] "            \
    "state_steps, *, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool "                        \
    "maximize, " COMMON_ARGUMENTS ") -> ()")                                                                           \
  X(asgd_, asgd_,                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] mus, Tensor(d!)[] axs, Tensor(e!)[] etas, Tensor(f!)[] "   \
    "state_steps, *, Tensor lr, float lambd, float alpha, float t0, float weight_decay, bool "                         \
    "maximize, " COMMON_ARGUMENTS ") -> ()")                                                                           \
  X(lamb_, lamb_,                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "                      \
    "Tensor(e!)[] state_steps, *, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "                \
    "bool maximize, " COMMON_ARGUMENTS ") -> ()")                                                                      \
  X(lars_, lars_,                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, Tensor lr, float momentum, "          \
    "float weight_decay, float trust_coefficient, float eps, bool nesterov, bool maximize, " COMMON_ARGUMENTS          \
    ") -> ()")                                                                                                         \
  X(lion_, lion_,                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, *, Tensor lr, float beta1, float beta2, float "  \
    "weight_decay, bool maximize, " COMMON_ARGUMENTS ") -> ()")                                                        \
  X(muon_, muon_,                                                                                                      \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, Tensor lr, float weight_decay, "      \
    "float momentum, bool nesterov, float ns_a, float ns_b, float ns_c, float eps, int ns_steps, "                     \
    "bool match_rms_adamw, " COMMON_ARGUMENTS ") -> ()")                                                               \
  X(nadam_, nadam_,                                                                                                    \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] "         \
    "mu_products, Tensor(f!)[] state_steps, *, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "   \
    "float momentum_decay, bool maximize, bool decoupled_weight_decay, " COMMON_ARGUMENTS ") -> ()")                   \
  X(radam_, radam_,                                                                                                    \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] "         \
    "state_steps, *, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, bool "         \
    "decoupled_weight_decay, " COMMON_ARGUMENTS ") -> ()")                                                             \
  X(rprop_, rprop_,                                                                                                    \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] prevs, Tensor(d!)[] step_sizes, Tensor(e!)[] "             \
    "state_steps, *, float etaminus, float etaplus, float step_size_min, float step_size_max, bool "                   \
    "maximize, " COMMON_ARGUMENTS ") -> ()")                                                                           \
  X(sparse_adam_, sparse_adam_,                                                                                        \
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] "         \
    "state_steps, *, Tensor lr, float beta1, float beta2, float eps, bool maximize, " COMMON_ARGUMENTS ") -> ()")

// The ops whose gradients may be sparse. The dispatcher sees these by a key of their own.
#define FOR_EACH_SPARSE_OP(X) X(sgd_, sgd_) X(adagrad_, adagrad_) X(sparse_adam_, sparse_adam_)

namespace {

// The schema, with `averages` empty where it is not given: the text of a schema cannot say that of a list of tensors.
c10::FunctionSchema parsed(const char* text) {
  const c10::FunctionSchema schema = torch::schema(text);
  std::vector<c10::Argument> arguments = schema.arguments();
  for (c10::Argument& argument : arguments) {
    if (argument.name() != "averages" || !argument.kwarg_only()) continue;
    argument = c10::Argument(argument.name(), argument.type(), argument.N(), c10::List<at::Tensor>(), true,
                             argument.alias_info() ? std::optional(*argument.alias_info()) : std::nullopt);
  }
  return schema.cloneWithArguments(std::move(arguments));
}

}  // namespace

// Ops on gradients alone. What they return is new, and on the device of their arguments.
#define FOR_EACH_GRADIENT_OP(X)                                                                            \
  X(grad_norm,                                                                                             \
    "(Tensor[] grads, *, float norm_type=2.0, float? max_norm=None, bool skip_nonfinite=False, "           \
    "float? skip_above=None, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(a!)? skips=None) -> " \
    "(Tensor norm, Tensor grad_factor, Tensor found_inf)")                                                 \
  X(clip_, "(Tensor(a!)[] tensors, *, float? limit=None, Tensor? factor=None) -> ()")                      \
  X(norms, "(Tensor[] tensors, *, float norm_type=2.0) -> Tensor")                                         \
  X(count_nonfinite, "(Tensor[] tensors) -> Tensor")

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
#define DEFINE(op, function, schema) m.def(parsed(#op schema));
  FOR_EACH_OP(DEFINE)
#undef DEFINE
#define DEFINE(op, schema) m.def(#op schema);
  FOR_EACH_GRADIENT_OP(DEFINE)
  FOR_EACH_LBFGS_OP(DEFINE)
#undef DEFINE
}

TORCH_LIBRARY_IMPL(optim_ext, CPU, m) {
#define IMPLEMENT(op, function, schema) m.impl(#op, &Op<#op, &function<CpuDriver>>::call);
  FOR_EACH_OP(IMPLEMENT)
#undef IMPLEMENT
#define IMPLEMENT(op, schema) m.impl(#op, &op<CpuDriver>);
  FOR_EACH_GRADIENT_OP(IMPLEMENT)
  FOR_EACH_LBFGS_OP(IMPLEMENT)
#undef IMPLEMENT
}

TORCH_LIBRARY_IMPL(optim_ext, SparseCPU, m) {
#define IMPLEMENT(op, function) m.impl(#op, &Op<#op, &function<CpuDriver>>::call);
  FOR_EACH_SPARSE_OP(IMPLEMENT)
#undef IMPLEMENT
}

#if defined(OPTIM_EXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(optim_ext, SparseCUDA, m) {
#define IMPLEMENT(op, function) m.impl(#op, &Op<#op, &function<CudaDriver>>::call);
  FOR_EACH_SPARSE_OP(IMPLEMENT)
#undef IMPLEMENT
}

TORCH_LIBRARY_IMPL(optim_ext, CUDA, m) {
#define IMPLEMENT(op, function, schema) m.impl(#op, &Op<#op, &function<CudaDriver>>::call);
  FOR_EACH_OP(IMPLEMENT)
#undef IMPLEMENT
#define IMPLEMENT(op, schema) m.impl(#op, &op<CudaDriver>);
  FOR_EACH_GRADIENT_OP(IMPLEMENT)
  FOR_EACH_LBFGS_OP(IMPLEMENT)
#undef IMPLEMENT
}
#define PLAN_ENTRY(op, function, schema) \
  {#op, planned<&Op<#op, &function<CpuDriver>>::call, &Op<#op, &function<CudaDriver>>::call>("optim_ext::" #op)},
#else
#define PLAN_ENTRY(op, function, schema) {#op, planned<&Op<#op, &function<CpuDriver>>::call>("optim_ext::" #op)},
#endif

PYBIND11_MODULE(_C, m) {
  bind_plan(m, {FOR_EACH_STEP_OP(PLAN_ENTRY)});
  bind_average_plan(m);
  bind_gradients(m);
  bind_grad_marks(m);
  bind_lbfgs_params(m);
#define NAME(op, function, schema) #op,
  m.def(
      "step_ops", [] { return std::vector<std::string>{FOR_EACH_STEP_OP(NAME)}; }, "The ops an optimizer steps with.");
  m.def("ops", [] { return std::vector<std::string>{FOR_EACH_OP(NAME)}; }, "The names of all ops.");
#undef NAME
  m.def("vectors_of_one_block", &vectors_of_one_block,
        "Vectors on the CPU that lie one behind the other, in huge pages where the system has them.");
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
