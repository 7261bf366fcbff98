// The CPU loop, compiled once per instruction set inside the namespace OPTIM_EXT_ISA. No include guard, no torch, and
// nothing emitted but the sweeps themselves: everything else is inlined, so no code built for AVX-512 can be linked
// into a baseline caller.

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

#define OPTIM_EXT_INLINE inline __attribute__((always_inline))
// What every sweep calls and none needs a copy of. In the unnamed namespace, so it stays within its instruction set.
#define OPTIM_EXT_SHARED __attribute__((noinline))

// Elements converted at a time where memory and arithmetic differ in type: small enough that the buffers stay in L1.
constexpr int64_t kTile = 256;

constexpr int kGrad = 1;

template <class V>
constexpr Storage kNative = sizeof(V) == 8 ? Storage::f64 : Storage::f32;

// A loop the compiler turns into one packed loop; its iterations are independent by construction.
#define OPTIM_EXT_FOR(i, n) _Pragma("GCC ivdep") for (int64_t i = 0; i < (n); ++i)

// n elements that lie `stride` apart.
template <class T, class V, class Convert>
OPTIM_EXT_INLINE void widen_run(const T* x, int64_t stride, V* to, int64_t n, const Convert& wide) {
  if (stride == 1) {
    OPTIM_EXT_FOR(i, n) to[i] = static_cast<V>(wide(x[i]));
  } else if (stride == 0) {
    const V value = static_cast<V>(wide(*x));
    OPTIM_EXT_FOR(i, n) to[i] = value;
  } else {
    OPTIM_EXT_FOR(i, n) to[i] = static_cast<V>(wide(x[i * stride]));
  }
}

template <class T, class V, class Convert>
OPTIM_EXT_INLINE void narrow_run(const V* from, T* x, int64_t stride, int64_t n, const Convert& narrowed) {
  if (stride == 1) {
    OPTIM_EXT_FOR(i, n) x[i] = narrowed(from[i]);
  } else {
    OPTIM_EXT_FOR(i, n) x[i * stride] = narrowed(from[i]);
  }
}

template <class V>
OPTIM_EXT_INLINE void widen(const void* from, Storage storage, int64_t stride, V* to, int64_t n) {
  const auto* const halves = static_cast<const uint16_t*>(from);
  switch (storage) {
    case Storage::f32: return widen_run(static_cast<const float*>(from), stride, to, n, [](float x) { return x; });
    case Storage::f64: return widen_run(static_cast<const double*>(from), stride, to, n, [](double x) { return x; });
    case Storage::bf16: return widen_run(halves, stride, to, n, [](uint16_t x) { return widen_bf16(x); });
    case Storage::f16: return widen_run(halves, stride, to, n, [](uint16_t x) { return widen_f16(x); });
  }
}

template <class V>
OPTIM_EXT_INLINE void narrow(const V* from, void* to, Storage storage, int64_t stride, int64_t n) {
  auto* const halves = static_cast<uint16_t*>(to);
  switch (storage) {
    case Storage::f32:
      return narrow_run(from, static_cast<float*>(to), stride, n, [](V x) { return static_cast<float>(x); });
    case Storage::f64:
      return narrow_run(from, static_cast<double*>(to), stride, n, [](V x) { return static_cast<double>(x); });
    case Storage::bf16:
      return narrow_run(from, halves, stride, n, [](V x) { return narrow_bf16(static_cast<float>(x)); });
    case Storage::f16:
      return narrow_run(from, halves, stride, n, [](V x) { return narrow_f16(static_cast<float>(x)); });
  }
}

// One operand's share of a tile: a pointer to V, which is the memory itself wherever that is possible.
template <class V>
struct TileOperand {
  void* data;
  Storage storage;
  const Layout* layout;
  int operand;

  OPTIM_EXT_INLINE bool in_place() const { return layout == nullptr && storage == kNative<V>; }
  OPTIM_EXT_INLINE void* at(int64_t start) const { return static_cast<char*>(data) + start * bytes_of(storage); }

  OPTIM_EXT_INLINE V* open(int64_t start, int64_t n, V* buffer) const {
    if (in_place()) return static_cast<V*>(data) + start;
    load(start, n, buffer);
    return buffer;
  }

  OPTIM_EXT_INLINE void close(int64_t start, int64_t n, const V* buffer) const {
    if (!in_place()) store(start, n, buffer);
  }

  OPTIM_EXT_SHARED void load(int64_t start, int64_t n, V* buffer) const {
    walk(start, n, [&](int64_t i, int64_t count, int64_t offset, int64_t stride) {
      widen(at(offset), storage, stride, buffer + i, count);
    });
  }

  OPTIM_EXT_SHARED void store(int64_t start, int64_t n, const V* buffer) const {
    walk(start, n, [&](int64_t i, int64_t count, int64_t offset, int64_t stride) {
      narrow(buffer + i, at(offset), storage, stride, count);
    });
  }

  // Visits n elements from `start` in runs of one stride: those of the fastest dimension, or all where memory is dense.
  // Only the first run is found by division.
  template <class Visit>
  OPTIM_EXT_INLINE void walk(int64_t start, int64_t n, const Visit& visit) const {
    int64_t place[kMaxDims], offset = start, run = n, stride = 1;
    const int last = layout ? layout->ndim - 1 : 0;
    if (layout) {
      offset = layout->locate(operand, start, place);
      run = layout->sizes[last] - place[last];
      stride = layout->strides[operand][last];
    }
    for (int64_t i = 0;;) {
      const int64_t count = run < n - i ? run : n - i;
      visit(i, count, offset, stride);
      i += count;
      if (i >= n) return;
      offset = layout->next_run(operand, offset + count * stride, place);
      run = layout->sizes[last];
    }
  }
};

// Operand I of element i: for the gradient a value of the rule's own, for one that this variant of the rule does not
// have a scratch value.
template <class Rule, class V, int I>
OPTIM_EXT_INLINE decltype(auto) element(V* const* tile, int64_t i, V& scratch, V grad_factor) {
  if constexpr (I == kGrad) {
    return tile[I][i] * grad_factor;
  } else if constexpr ((Rule::kUsed >> I) & 1u) {
    return (tile[I][i]);
  } else {
    return (scratch);
  }
}

// `after(i)` is called when element i has been updated.
template <class Rule, class V, class After, int... I>
OPTIM_EXT_INLINE void apply(const Rule& given, V* const* given_tile, int64_t n, V grad_factor, const After& given_after,
                            Indices<I...>) {
  const Rule rule = given;  // copies, so that no store through a tile can be thought to change them
  const After after = given_after;
  V* const tile[] = {given_tile[I]...};
  OPTIM_EXT_FOR(i, n) {
    V scratch = V(0);
    rule(element<Rule, V, I>(tile, i, scratch, grad_factor)...);
    after(i);
  }
}

}  // namespace

// Applies `rule` to elements [begin, end) of one parameter, and brings its average up to date where the same loop can.
template <class Rule, class V>
void sweep(const Rule& rule, const Bundle& bundle, int64_t begin, int64_t end, const Pass& pass) {
  alignas(64) V buffer[Rule::kOperands][kTile];
  TileOperand<V> operands[Rule::kOperands];
  bool all_in_place = true;
  for (int k = 0; k < Rule::kOperands; ++k) {
    operands[k] = {bundle.data[k], bundle.storage[k], bundle.layout, k};
    if ((Rule::kUsed >> k) & 1u) all_in_place &= operands[k].in_place();
  }
  const bool averages = bundle.average != nullptr && averages_in_loop(bundle);
  const int64_t length = all_in_place ? end - begin : kTile;
  for (int64_t start = begin; start < end; start += length) {
    const int64_t n = end - start < length ? end - start : length;
    V* tile[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUsed >> k) & 1u) tile[k] = operands[k].open(start, n, buffer[k]);
    }
    if (pass.unscale) {
      V* const grad = tile[kGrad];
      const V scale = V(pass.grad_scale);
      OPTIM_EXT_FOR(i, n) grad[i] = grad[i] / scale;
      operands[kGrad].close(start, n, grad);
    }
    constexpr typename MakeIndices<Rule::kOperands>::type kAll;
    if (averages) {
      const rules::Average rule_of_average{pass.average_weight};
      V* const average = static_cast<V*>(bundle.average->data[0]) + start;
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
  }
}

#define OPTIM_EXT_INSTANTIATE(...)                                                                            \
  template void sweep<rules::__VA_ARGS__, float>(const rules::__VA_ARGS__&, const Bundle&, int64_t, int64_t,  \
                                                 const Pass&);                                                \
  template void sweep<rules::__VA_ARGS__, double>(const rules::__VA_ARGS__&, const Bundle&, int64_t, int64_t, \
                                                  const Pass&);
OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_INSTANTIATE)
#undef OPTIM_EXT_INSTANTIATE
#include "reduce-inl.h"

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
