#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <map>

#include "../rules/muon.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

// Matrices of one shape are orthogonalized in one batch, up to this many elements: larger ones keep a device busy
// alone, and the batch needs memory of its own.
constexpr int64_t kBatchElements = 1 << 24;

// A batch of matrices, which is overwritten, of which the rule takes wide ones of norm one.
Tensor orthogonalized(const rules::Muon& options, Tensor matrices) {
  const bool is_tall = matrices.size(1) > matrices.size(2);
  if (is_tall) matrices = matrices.mT();
  const Tensor norms = at::linalg_vector_norm(matrices, 2, at::IntArrayRef{-2, -1}, /*keepdim=*/true);
  matrices.div_(norms.clamp_min(options.eps));
  matrices = options.orthogonalized(
      std::move(matrices), [](const Tensor& x) { return at::bmm(x, x.mT()); },
      [](double p, const Tensor& x, double q, const Tensor& y, const Tensor& z) {
        return at::baddbmm(x, y, z, /*beta=*/p, /*alpha=*/q);
      });
  return is_tall ? matrices.mT() : matrices;
}

struct MuonRow : StepRow<rules::Muon> {
  static constexpr bool kTakesCompanions = true;

  template <class Driver>
  static void run(const StepArguments<Options>& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    TORCH_CHECK_VALUE(given.options.ns_steps < 100, "optim_ext::", given.op,
                      ": Number of steps must be less than 100 for computational efficiency");
    // Everything is checked here; what follows only passes on parts of these lists.
    const auto& [params, grads, momentum_buffers] = given.lists;
    Options options{};
    const CallSpec all{.op = given.op,
                       .controls = given.controls,
                       .operands = {given.operand(0), given.operand(1), given.operand(2)},
                       .takes_companions = true};
    Call checked(all, 3, rules::all_operands(3), rules::operand_bit(0) | rules::operand_bit(2));
    checked.require_real_matrices();
    given.fill(checked, options);
    if (CheckOnly::active() || checked.empty() || checked.skip) return;

    const OverlapsChecked parts;
    std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> by_shape;
    for (size_t i = 0; i < params.size(); ++i) {
      if (params[i].numel() > 0) by_shape[{params[i].size(0), params[i].size(1)}].push_back(static_cast<int64_t>(i));
    }
    for (const auto& [shape, members] : by_shape) {
      const auto per_batch = static_cast<size_t>(std::max<int64_t>(1, kBatchElements / (shape.first * shape.second)));
      for (size_t begin = 0; begin < members.size(); begin += per_batch) {
        const std::vector<int64_t> batch(members.begin() + begin,
                                         members.begin() + std::min(members.size(), begin + per_batch));
        step_together<Driver>(given, options, batch);
      }
    }
  }

 private:
  // Steps matrices of one shape. The first sweep makes the momentum, the last one the parameter, each through what lies
  // beside it.
  template <class Driver>
  static void step_together(const StepArguments<Options>& given, const Options& options,
                            const std::vector<int64_t>& members) {
    constexpr unsigned kParamKept = rules::operand_bit(0), kMomentumKept = rules::operand_bit(2);
    const Members of(members);
    const StepControls controls =
        given.controls.with_companions(of.of_each_kind(given.controls.companions, given.lists[0].size()));
    const TensorList params = of(given.lists[0]), grads = of(given.lists[1]), buffers = of(given.lists[2]);
    const int64_t rows = params[0].size(0), columns = params[0].size(1);
    Tensor batch = at::empty({static_cast<int64_t>(members.size()), rows, columns},
                             params[0].options().dtype(at::kBFloat16).memory_format(std::nullopt));
    std::vector<Tensor> updates = batch.unbind();
    rules::MuonMomentum averaged{options.momentum, options.nesterov, 0.0};
    ops::run<Driver>(averaged,
                     {.op = given.op,
                      .controls = controls.without_average(),
                      .operands = {{"updates", updates}, {"grads", grads}, {"momentum_buffers", buffers}},
                      .counts = false,
                      .takes_companions = true,
                      .kept = kMomentumKept,
                      // Words of chance go by the parameter's order of memory, which its buffer has too.
                      .leader = controls.companions.empty() ? 0 : 2},
                     {});
    updates = orthogonalized(options, std::move(batch)).unbind();
    rules::MuonUpdate update{0.0, options.weight_decay,
                             options.lr_ratio(static_cast<double>(rows), static_cast<double>(columns))};
    ops::run<Driver>(update,
                     {.op = given.op,
                      .controls = controls.without_grads().with_averages(of(controls.averages)),
                      .operands = {{"params", params}, {"updates", updates}},
                      .takes_companions = true,
                      .kept = kParamKept},
                     {{"lr", update.lr, *given.tensors[0]}});
  }
};

const RegisteredStepOp<"muon_", MuonRow> muon;

}  // namespace

}  // namespace optim_ext::ops
