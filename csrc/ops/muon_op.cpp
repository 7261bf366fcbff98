#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <cmath>
#include <map>

#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

namespace {

// Matrices of one shape are orthogonalized in one batch, up to this many elements: larger ones keep a device busy
// alone, and the batch needs memory of its own.
constexpr int64_t kBatchElements = 1 << 24;

struct NewtonSchulz {
  double a, b, c, eps;
  int64_t steps;

  // Moves the singular values of a batch of matrices towards one, in the precision they are in.
  Tensor operator()(Tensor matrices) const {
    const bool is_tall = matrices.size(1) > matrices.size(2);
    if (is_tall) matrices = matrices.mT();
    matrices.div_(at::linalg_vector_norm(matrices, 2, at::IntArrayRef{-2, -1}, /*keepdim=*/true).clamp_min_(eps));
    for (int64_t i = 0; i < steps; ++i) {
      const Tensor gram = at::bmm(matrices, matrices.mT());
      const Tensor gram_update = at::baddbmm(gram, gram, gram, b, c);
      matrices = at::baddbmm(matrices, gram_update, matrices, a, 1);
    }
    return is_tall ? matrices.mT() : matrices;
  }
};

double lr_ratio(const Tensor& param, bool match_rms_adamw) {
  const auto rows = static_cast<double>(param.size(0)), columns = static_cast<double>(param.size(1));
  return match_rms_adamw ? 0.2 * std::sqrt(std::max(rows, columns)) : std::sqrt(std::max(1.0, rows / columns));
}

}  // namespace

template <class Driver>
void muon_(const Common& common, TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& lr,
           double weight_decay, double momentum, bool nesterov, double ns_a, double ns_b, double ns_c, double eps,
           int64_t ns_steps, bool match_rms_adamw) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK_VALUE(ns_steps >= 0 && ns_steps < 100, "optim_ext::", common.op,
                    ": Number of steps must be less than 100 for computational efficiency");
  // Everything is checked here; what follows only passes on parts of these lists.
  rules::MuonUpdate update{};
  update.weight_decay = weight_decay;
  const CallSpec all{.common = common,
                     .operands = {{"params", params}, {"grads", grads}, {"momentum_buffers", momentum_buffers}}};
  Call checked(all, 3, 7u, 5u);
  checked.require_real_matrices();
  double ignored = 0.0;
  for (const auto& [name, value] : {std::pair("weight_decay", weight_decay),
                                    {"momentum", momentum},
                                    {"eps", eps},
                                    {"ns_coefficients[0]", ns_a},
                                    {"ns_coefficients[1]", ns_b},
                                    {"ns_coefficients[2]", ns_c}}) {
    checked.set({{name, ignored, value}}, &ignored, sizeof ignored);
  }
  checked.set({{"lr", update.lr, lr}}, &update, sizeof update);
  if (CheckOnly::active() || checked.empty() || checked.skip) return;

  const OverlapsChecked parts;
  std::map<std::pair<int64_t, int64_t>, std::vector<size_t>> by_shape;
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].numel() > 0) by_shape[{params[i].size(0), params[i].size(1)}].push_back(i);
  }
  const NewtonSchulz orthogonalized{ns_a, ns_b, ns_c, eps, ns_steps};
  for (const auto& [shape, members] : by_shape) {
    const auto per_batch = static_cast<size_t>(std::max<int64_t>(1, kBatchElements / (shape.first * shape.second)));
    for (size_t begin = 0; begin < members.size(); begin += per_batch) {
      const size_t count = std::min(per_batch, members.size() - begin);
      const auto part = [&](TensorList list) {
        std::vector<Tensor> chosen;
        for (size_t n = 0; n < count; ++n) chosen.push_back(list[members[begin + n]]);
        return chosen;
      };
      const auto batch_params = part(params), batch_grads = part(grads), batch_buffers = part(momentum_buffers);
      Tensor batch = at::empty({static_cast<int64_t>(count), shape.first, shape.second},
                               batch_params[0].options().dtype(at::kBFloat16).memory_format(std::nullopt));
      std::vector<Tensor> updates = batch.unbind();
      const Common first{common.op, common.grad_scale, common.found_inf, common.grad_factor, {}, kNone};
      rules::MuonMomentum averaged{};
      averaged.nesterov = nesterov;
      run<Driver>(averaged,
                  {.common = first,
                   .operands = {{"updates", updates}, {"grads", batch_grads}, {"momentum_buffers", batch_buffers}}},
                  {{"momentum", averaged.momentum, momentum}});
      updates = orthogonalized(std::move(batch)).unbind();
      update.lr_ratio = lr_ratio(batch_params[0], match_rms_adamw);
      const auto batch_averages = common.averages.empty() ? std::vector<Tensor>() : part(common.averages);
      const Common second{common.op, kNone, common.found_inf, kNone, batch_averages, common.average_weight};
      run<Driver>(update, {.common = second, .operands = {{"params", batch_params}, {"updates", updates}}},
                  {{"lr", update.lr, lr}, {"weight_decay", update.weight_decay, weight_decay}});
    }
  }
}

OPTIM_EXT_INSTANTIATE_OP(muon_)

}  // namespace optim_ext::ops
