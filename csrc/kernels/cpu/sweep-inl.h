// The CPU loop, compiled once per instruction set inside the namespace OPTIM_EXT_ISA (for_each_isa.h). No include
// guard, no torch, and nothing for other files to link with: what is not inlined is in that namespace, so no code built
// for AVX-512 can be linked into a baseline caller.

#include "moves-inl.h"
#include "tiles-inl.h"
#include "rows-inl.h"
#include "strided-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// The elements of the pieces of memory that all operands have in common, one after the other, whatever the order within
// them; 0 where there are none, or where they are too long to be asked for as a whole.
template <class Rule>
OPTIM_EXT_INLINE int64_t common_piece(const Layout& layout) {
  int64_t piece = 1;
  for (int d = layout.ndim - 1; d > 0; --d) {
    piece *= layout.sizes[d];
    bool common = piece > 1;
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUsed >> k) & 1u) common = common && layout.strides[k][d - 1] == piece;
    }
    if (common) return piece <= kLongestPiece ? piece : 0;
  }
  return 0;
}

}  // namespace

// Applies `rule` to elements [begin, end) of one parameter, and brings its average up to date where the same loop can.
template <class Rule, class V>
void sweep(const void* given, const Bundle& bundle, int64_t begin, int64_t end, const Pass& pass) {
  const Rule& rule = *static_cast<const Rule*>(given);
  alignas(64) V buffer[Rule::kOperands][kTile];
  TileOperand<V> operands[Rule::kOperands];
  bool all_in_place = true, all_bf16 = bundle.layout == nullptr && bundle.average == nullptr && !pass.unscale;
  for (int k = 0; k < Rule::kOperands; ++k) {
    if (!((Rule::kUsed >> k) & 1u)) continue;
    operands[k] = TileOperand<V>(bundle, k);
    all_in_place &= operands[k].in_place();
    all_bf16 &= operands[k].storage == Storage::bf16;
  }
  constexpr typename MakeIndices<Rule::kOperands>::type kAll;
  if constexpr (sizeof(V) == sizeof(float) && OPTIM_EXT_REGISTER_BYTES > 16) {
    if (all_bf16) return apply_to_bf16(rule, bundle.data, begin, end - begin, float(pass.grad_factor), kAll);
  }
  if (bundle.layout != nullptr && bundle.layout->rows != nullptr) {
    bool native = !pass.unscale;
    for (int k = 0; k < Rule::kOperands; ++k) native &= !((Rule::kUsed >> k) & 1u) || bundle.storage[k] == kNative<V>;
    if (native) return sweep_rows<Rule, V>(rule, bundle, begin, end, V(pass.grad_factor));
  }
  if (bundle.layout != nullptr && !pass.unscale) {
    const V grad_factor = V(pass.grad_factor);
    switch (way_to<Rule, V>(bundle)) {
      case Way::runs: return sweep_runs<Rule, V, Way::runs>(rule, bundle, begin, end, grad_factor);
      case Way::each:
        if constexpr (count_of_used<Rule> <= kFew) {
          return sweep_runs<Rule, V, Way::each>(rule, bundle, begin, end, grad_factor);
        }
        break;
      case Way::blocks: return sweep_blocks<Rule, V>(rule, bundle, begin, end, grad_factor);
      case Way::tiles: break;
    }
  }
  const bool averages = bundle.average != nullptr && averages_in_loop(bundle);
  // Where there are short runs, tiles hold whole ones, and as many as turning takes at a time.
  constexpr int64_t kSide = Square<V>::kRows;
  const int64_t run = bundle.layout != nullptr ? bundle.layout->sizes[bundle.layout->ndim - 1] : 1;
  const int64_t length = all_in_place   ? end - begin
                         : run <= kTile ? kTile - kTile % (run * kSide <= kTile ? run * kSide : run)
                                        : kTile;
  const int64_t in_first = run <= kTile ? begin % run : 0;
  const int64_t ahead = bundle.layout != nullptr ? common_piece<Rule>(*bundle.layout) : 0;
  Start start(bundle.layout, begin);
  for (int64_t n; start.index < end;) {
    n = start.index == begin && !all_in_place ? length - in_first : length;
    if (n > end - start.index) n = end - start.index;
    const Start next(start.index + n < end ? bundle.layout : nullptr, start.index + n);
    V* tile[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      if (((Rule::kUsed >> k) & 1u) && next.index < end) operands[k].fetch(next, n, ahead);
    }
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUsed >> k) & 1u) tile[k] = operands[k].open(start, n, buffer[k]);
    }
    if (pass.unscale) {
      V* const grad = tile[kGradOperand];
      const V scale = V(pass.grad_scale);
      OPTIM_EXT_FOR(i, n) grad[i] = grad[i] / scale;
      operands[kGradOperand].close(start, n, grad);
    }
    if (averages) {
      const rules::Average rule_of_average{pass.average_weight};
      V* const average = static_cast<V*>(bundle.average->data[0]) + start.index;
      const V* const param = tile[0];
      const auto update_average = [=](int64_t i)
                                      __attribute__((always_inline)) { rule_of_average(average[i], param[i]); };
      apply<Rule, V>(rule, tile, n, V(pass.grad_factor), update_average, kAll);
    } else {
      apply<Rule, V>(rule, tile, n, V(pass.grad_factor), [](int64_t) __attribute__((always_inline)) {}, kAll);
    }
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUpdates >> k) & 1u) operands[k].close(start, n, tile[k]);
    }
    start = next;
  }
}

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
