#include "planned_call.h"

#include <utility>

#include "gradients.h"

namespace optim_ext::ops {

using at::Tensor, at::TensorList;

bool gather(const PlannedCall& call, Gathered& out) {
  std::vector<const PythonTensors*> lists;
  for (const PythonTensors& list : call.lists) lists.push_back(&list);
  lists.push_back(&call.averages);
  for (const PythonTensors& kind : call.companions) lists.push_back(&kind);
  if (!out.taken.take(std::move(lists))) return false;
  const TensorList params = out.taken.get(kParams);
  const Tensor& first = params[0].grad();
  if (first.defined() && first.layout() == at::kStrided && !is_intercepted(first) && !first.is_conj() &&
      !first.is_neg() && !is_intercepted(params[0])) {
    const c10::DispatchKeySet keys = params[0].key_set();
    const auto usual = [&](int64_t i) {
      const c10::TensorImpl* const param = params[i].unsafeGetTensorImpl();
      return call.ready[i] && param->key_set() == keys && param->device() == call.device ? param : nullptr;
    };
    if (take_usual(first, static_cast<int64_t>(params.size()), usual, out.grads)) return true;
  }
  out.grads.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& grad = params[i].grad();
    if (!grad.defined()) {
      if (out.all) {
        out.all = false;
        for (size_t j = 0; j < i; ++j) out.members.push_back(static_cast<int64_t>(j));
      }
      out.idle.push_back(static_cast<int64_t>(i));
      continue;
    }
    const bool sparse = call.takes_sparse && grad.is_sparse() && !grad.is_complex() && params[i].is_contiguous();
    if (sparse && call.is_averaged()) return false;  // only some rows are stepped, but all are averaged
    if (!call.ready[i] || !(sparse || (call.takes_dense && grad.layout() == at::kStrided)) || is_intercepted(grad) ||
        params[i].device() != call.device || is_intercepted(params[i]))
      return false;
    out.grads.push_back(grad.is_conj() || grad.is_neg() ? grad.resolve_conj().resolve_neg() : grad);
    if (!out.all) out.members.push_back(static_cast<int64_t>(i));
  }
  return true;
}

}  // namespace optim_ext::ops
