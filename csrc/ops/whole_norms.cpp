#include "whole_norms.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace optim_ext::ops {

namespace {
thread_local WholeNorms* current_norms = nullptr;
}  // namespace

WholeNorms::WholeNorms(const WholesByPart& wholes) : wholes_(wholes), before_(current_norms) { current_norms = this; }
WholeNorms::~WholeNorms() { current_norms = before_; }
WholeNorms* WholeNorms::current() { return current_norms; }

void WholeNorms::add(at::TensorList params, const at::Tensor& norms) {
  OfCall& call = calls_.emplace_back(OfCall{norms, {}});
  for (const at::Tensor& param : params) {
    const auto found = wholes_.find(param.unsafeGetTensorImpl());
    call.rows.push_back(found == wholes_.end() ? -1 : found->second.row);
  }
}

template <class Visit>
void WholeNorms::over_runs(const OfCall& call, const at::Tensor& totals, const Visit& visit) {
  const auto count = static_cast<int64_t>(call.rows.size());
  for (int64_t begin = 0, end; begin < count; begin = end) {
    const int64_t first = call.rows[begin];
    for (end = begin + 1; end < count && first >= 0 && call.rows[end] == first + end - begin;) ++end;
    if (first >= 0) visit(call.norms.narrow(1, begin, end - begin), totals.narrow(0, first, end - begin));
  }
}

at::Tensor WholeNorms::sums(int64_t rows) const {
  const at::Device device = calls_.empty() ? at::Device(at::kCPU) : calls_[0].norms.device();
  const at::Tensor all = at::zeros({rows, kMaxScalars}, at::TensorOptions().device(device).dtype(at::kDouble));
  for (const OfCall& call : calls_) {
    over_runs(call, all, [](const at::Tensor& norms, const at::Tensor& totals) { totals.copy_(norms.square().t()); });
  }
  return all;
}

void WholeNorms::know(const at::Tensor& totals) {
  for (const OfCall& call : calls_) {
    over_runs(call, totals,
              [](const at::Tensor& norms, const at::Tensor& of_wholes) { norms.copy_(of_wholes.sqrt().t()); });
  }
  gathers_ = false;
}

at::Tensor WholeNorms::next() {
  TORCH_CHECK(taken_ < calls_.size(), "optim_ext: a call that was not there when norms were measured");
  return calls_[taken_++].norms;
}

double WholeNorms::numel_of(const at::Tensor& param, double own) const {
  const auto found = wholes_.find(param.unsafeGetTensorImpl());
  return found == wholes_.end() ? own : found->second.numel;
}

at::Tensor room_for_norms(const Call& call) {
  return at::empty({kMaxScalars, static_cast<int64_t>(call.bundles.size())},
                   at::TensorOptions().device(call.device).dtype(at::kDouble));
}

void keep_all(Call& call, const StepControls& controls) {
  at::Tensor factor;
  if (!call.device.is_cpu() && controls.grad_scale) {
    const at::Tensor scale = controls.grad_scale->to(at::kDouble);
    factor = controls.grad_factor ? controls.grad_factor->div(scale) : scale.reciprocal();
  }
  call.keep_all(factor);
}

}  // namespace optim_ext::ops
