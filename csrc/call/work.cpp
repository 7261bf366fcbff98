#include "work.h"

namespace optim_ext::ops {

void make_ready(const RuleProgram& program, const void* rule, const Bundle& bundle, void* ready, rules::Scalar* after) {
  rules::Scalar scalars[kMaxScalars];
  for (int k = 0; k < program.scalars; ++k) {
    scalars[k] = {bundle.scalars[k].value, bundle.scalars[k].storage == Storage::f64};
  }
  program.at_step(rule, bundle.step, scalars, ready);
  if (after) std::copy_n(scalars, program.scalars, after);
}

void Work::begin_second_rule() {
  pass.unscale = false;
  pass.on_device.grad_scale = nullptr;
  steps_on_device = draws_on_device = false;
}

void Work::use_scalars(int k, const double* values) {
  for (Bundle& bundle : bundles) {
    ScalarState& scalar = bundle.scalars[k];
    scalar = {device.is_cpu() ? *values : 0.0, device.is_cpu() ? nullptr : const_cast<double*>(values), Storage::f64};
    ++values;
  }
}

Bundle one_operand(const Bundle& from, int operand, Layout& layout) {
  Bundle bundle{};
  bundle.data[0] = from.data[operand];
  bundle.storage[0] = from.storage[operand];
  bundle.numel = from.numel;
  if (!from.layout) return bundle;
  layout = *from.layout;
  std::copy_n(from.layout->strides[operand], kMaxDims, layout.strides[0]);
  if (layout.outer) layout.outer += operand * layout.sizes[0];
  bundle.layout = &layout;
  return bundle;
}

OneOperand::OneOperand(const Work& call, int operand) {
  device = call.device;
  Layout unused;
  for (const Bundle& from : call.bundles)
    bundles.push_back(one_operand(from, operand, from.layout ? layouts_.emplace_back() : unused));
}

}  // namespace optim_ext::ops
