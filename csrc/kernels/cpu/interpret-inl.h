// The tile interpreter, compiled once per instruction set inside the namespace OPTIM_EXT_ISA (for_each_isa.h).

#include "sweep-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// Elements that are worked on at a time: registers are of a kilobyte each.
template <class V>
constexpr int64_t kRegister = 1024 / sizeof(V);

// What is most of a rule, with a factor that all elements share: its tile need not be read then. False for the others.
template <class V>
OPTIM_EXT_INLINE bool run_shared(TileOp op, V* to, V a, const V* b, const V* c, int64_t n) {
#define OPTIM_EXT_CASE(name, value) \
  case TileOp::name: OPTIM_EXT_FOR(i, n) to[i] = value; return true;
  // clang-format off
  switch (op) {
    OPTIM_EXT_CASE(add, a + b[i])
    OPTIM_EXT_CASE(multiply, a * b[i])
    OPTIM_EXT_CASE(multiply_add, a * b[i] + c[i])
    OPTIM_EXT_CASE(multiply_subtract, a * b[i] - c[i])
    OPTIM_EXT_CASE(subtract_product, c[i] - a * b[i])
    default: return false;
  }
    // clang-format on
#undef OPTIM_EXT_CASE
}

template <class V>
OPTIM_EXT_SHARED void run_tile(const RuleCode::Loops& loops, V* const* registers, int64_t n) {
  for (int64_t k = 0; k < loops.tile_count; ++k) {
    const TileInstruction in = loops.tile[k];
    V* const to = registers[in.to];
    const V *const a = registers[in.a], *const b = registers[in.b], *const c = registers[in.c];
    if (in.a >= loops.first_shared && run_shared(in.op, to, a[0], b, c, n)) continue;
    if (in.b >= loops.first_shared && run_shared(in.op, to, b[0], a, c, n)) continue;
#define OPTIM_EXT_CASE(name, value) \
  case TileOp::name: OPTIM_EXT_FOR(i, n) to[i] = value; break;
    switch (in.op) {
      OPTIM_EXT_CASE(copy, a[i])
      OPTIM_EXT_CASE(negate, -a[i])
      OPTIM_EXT_CASE(root, rules::root(a[i]))
      OPTIM_EXT_CASE(sign, rules::sign(a[i]))
      OPTIM_EXT_CASE(magnitude, rules::magnitude(a[i]))
      OPTIM_EXT_CASE(exponential, rules::exponential(a[i]))
      OPTIM_EXT_CASE(logarithm, rules::logarithm(a[i]))
      OPTIM_EXT_CASE(add, a[i] + b[i])
      OPTIM_EXT_CASE(subtract, a[i] - b[i])
      OPTIM_EXT_CASE(multiply, a[i] * b[i])
      OPTIM_EXT_CASE(divide, a[i] / b[i])
      OPTIM_EXT_CASE(smaller, rules::smaller(a[i], b[i]))
      OPTIM_EXT_CASE(larger, rules::larger(a[i], b[i]))
      OPTIM_EXT_CASE(less, a[i] < b[i] ? V(1) : V(0))
      OPTIM_EXT_CASE(less_equal, a[i] <= b[i] ? V(1) : V(0))
      OPTIM_EXT_CASE(equal, a[i] == b[i] ? V(1) : V(0))
      OPTIM_EXT_CASE(not_equal, a[i] != b[i] ? V(1) : V(0))
      OPTIM_EXT_CASE(both, a[i] * b[i])
      OPTIM_EXT_CASE(either, a[i] > b[i] ? a[i] : b[i])
      OPTIM_EXT_CASE(none, V(1) - a[i])
      OPTIM_EXT_CASE(select, a[i] != V(0) ? b[i] : c[i])
      OPTIM_EXT_CASE(lerp, rules::lerp(a[i], b[i], c[i]))
      OPTIM_EXT_CASE(multiply_add, a[i] * b[i] + c[i])
      OPTIM_EXT_CASE(multiply_subtract, a[i] * b[i] - c[i])
      OPTIM_EXT_CASE(subtract_product, c[i] - a[i] * b[i])
      case TileOp::choose: {
        const V* const chosen = a[0] != V(0) ? b : c;
        OPTIM_EXT_FOR(i, n) to[i] = chosen[i];
        break;
      }
      case TileOp::lerp_by: {
        const V weight = c[0];
        OPTIM_EXT_FOR(i, n) to[i] = rules::lerp(a[i], b[i], weight);
        break;
      }
    }
#undef OPTIM_EXT_CASE
  }
}

}  // namespace

// Applies an OpenRule by its code to elements [begin, end) of one parameter, and brings its average up to date where
// the same loop can.
template <class V>
void interpret(const void* given, const Bundle& bundle, int64_t begin, int64_t end, const Pass& pass) {
  const OpenRule& rule = *static_cast<const OpenRule*>(given);
  const RuleCode::Loops code = rule.code->loops;
  const int operands = code.operands, registers = code.registers;
  const auto is_used = [&](int k) { return ((code.used >> k) & 1u) != 0; };
  alignas(64) V buffers[RuleCode::kMostRegisters + 1][kRegister<V>];
  V* tile[RuleCode::kMostRegisters];
  for (int k = 0; k < registers; ++k) tile[k] = buffers[k];

  const int64_t filled = end - begin < kRegister<V> ? end - begin : kRegister<V>;
  for (int k = code.first_shared; k < registers; ++k) {
    const Shared shared = code.shared[k - code.first_shared];
    const V value = V(shared.field < 0 ? shared.constant : rule.numbers[code.hypers + shared.field]);
    V* const to = buffers[k];
    OPTIM_EXT_FOR(i, filled) to[i] = value;
  }

  TileOperand<V> of[kMaxOperands];
  for (int k = 0; k < operands; ++k) {
    if (is_used(k)) of[k] = TileOperand<V>(bundle, k);
  }
  const V factor = V(pass.grad_factor), turn = V(rule.numbers[0]);
  const bool as_it_is = factor * turn == V(1);
  const bool averages = bundle.average != nullptr && averages_in_loop(bundle);
  // Where there are short runs, tiles hold whole ones.
  const int64_t run = bundle.layout != nullptr ? bundle.layout->sizes[bundle.layout->ndim - 1] : 1;
  const int64_t length = run <= kRegister<V> ? kRegister<V> - kRegister<V> % run : kRegister<V>;
  const int64_t in_first = run <= kRegister<V> ? begin % run : 0;
  Start start(bundle.layout, begin);
  for (int64_t n; start.index < end;) {
    n = start.index == begin ? length - in_first : length;
    if (n > end - start.index) n = end - start.index;
    for (int k = 0; k < operands; ++k) {
      if (is_used(k)) tile[k] = of[k].open(start, n, buffers[k]);
    }
    if (pass.unscale) {
      V* const grad = tile[kGradOperand];
      const V scale = V(pass.grad_scale);
      OPTIM_EXT_FOR(i, n) grad[i] = grad[i] / scale;
      of[kGradOperand].close(start, n, grad);
    }
    if (!as_it_is) {
      const V* const grad = tile[kGradOperand];
      V* const to = buffers[RuleCode::kMostRegisters];
      OPTIM_EXT_FOR(i, n) to[i] = grad[i] * factor * turn;
      tile[kGradOperand] = to;
    }
    run_tile<V>(code, tile, n);
    if (averages) {
      const rules::Average rule_of_average{pass.average_weight};
      V* const average = static_cast<V*>(bundle.average->data[0]) + start.index;
      const V* const param = tile[0];
      OPTIM_EXT_FOR(i, n) rule_of_average(average[i], param[i]);
    }
    for (int k = 0; k < operands; ++k) {
      if ((code.updates >> k) & 1u) of[k].close(start, n, tile[k]);
    }
    start = Start(start.index + n < end ? bundle.layout : nullptr, start.index + n);
  }
}

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
