// The CPU loop, compiled once per instruction set inside the namespace OPTIM_EXT_ISA (for_each_isa.h). No include
// guard, no torch, and nothing for other files to link with: what is not inlined is in that namespace, so no code built
// for AVX-512 can be linked into a baseline caller.

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

#define OPTIM_EXT_INLINE inline __attribute__((always_inline))
// What every sweep calls and none needs a copy of: not inlined, but in the unnamed namespace.
#define OPTIM_EXT_SHARED __attribute__((noinline))

// Elements converted at a time where memory and arithmetic differ in type: small enough that the buffers stay in L1.
constexpr int64_t kTile = 256;

template <class V>
constexpr Storage kNative = sizeof(V) == 8 ? Storage::f64 : Storage::f32;

// A loop the compiler turns into one packed loop; its iterations are independent by construction.
#define OPTIM_EXT_FOR(i, n) _Pragma("GCC ivdep") for (int64_t i = 0; i < (n); ++i)

// Elements that fill a tile in one go: `runs` runs of `length` elements, which lie one behind the other in the tile.
struct Block {
  int64_t runs, length;
  int64_t run_stride, stride;  // in memory, from run to run and from element to element
};

// Calls visit(place in the tile, offset in memory) for all of them, with the longer loop inside: rows of a few elements
// would otherwise cost more to begin than to read.
template <class Visit>
OPTIM_EXT_INLINE void over_block(const Block& given, const Visit& visit) {
  const Block block = given;
  if (block.runs > block.length) {
    for (int64_t e = 0; e < block.length; ++e) {
      OPTIM_EXT_FOR(r, block.runs) visit(r * block.length + e, r * block.run_stride + e * block.stride);
    }
  } else {
    for (int64_t r = 0; r < block.runs; ++r) {
      OPTIM_EXT_FOR(e, block.length) visit(r * block.length + e, r * block.run_stride + e * block.stride);
    }
  }
}

// Runs of few elements, of which none needs converting, in two moves each that may overlap: kHalf bytes from either
// end.
template <int kHalf, class T>
OPTIM_EXT_INLINE void move_runs(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t runs,
                                int64_t length) {
  const int64_t second = length - kHalf / static_cast<int64_t>(sizeof(T));
  for (int64_t r = 0; r < runs; ++r, from += from_step, to += to_step) {
    __builtin_memcpy(to, from, kHalf);
    __builtin_memcpy(to + second, from + second, kHalf);
  }
}

// Whether move_short_runs() has moved them.
template <class T>
OPTIM_EXT_INLINE bool move_short_runs(const T* from, int64_t from_step, T* to, int64_t to_step, const Block& block) {
  const int64_t bytes = block.length * static_cast<int64_t>(sizeof(T));
  if (block.stride != 1 || block.runs < 2 || bytes < 8 || bytes > 64) return false;
  if (bytes >= 32) {
    move_runs<32>(from, from_step, to, to_step, block.runs, block.length);
  } else if (bytes >= 16) {
    move_runs<16>(from, from_step, to, to_step, block.runs, block.length);
  } else {
    move_runs<8>(from, from_step, to, to_step, block.runs, block.length);
  }
  return true;
}
template <class T, class V>
OPTIM_EXT_INLINE bool move_short_runs(const T*, int64_t, V*, int64_t, const Block&) {
  return false;  // they need converting
}

template <class T, class V, class Convert>
OPTIM_EXT_INLINE void widen_block(const T* x, const Block& block, V* to, const Convert& wide) {
  if (move_short_runs(x, block.run_stride, to, block.length, block)) return;
  if (block.runs == 1 && block.stride == 1) {
    OPTIM_EXT_FOR(i, block.length) to[i] = static_cast<V>(wide(x[i]));
  } else {
    over_block(block,
               [=](int64_t i, int64_t at) __attribute__((always_inline)) { to[i] = static_cast<V>(wide(x[at])); });
  }
}

template <class T, class V, class Convert>
OPTIM_EXT_INLINE void narrow_block(const V* from, T* x, const Block& block, const Convert& narrowed) {
  if (move_short_runs(from, block.length, x, block.run_stride, block)) return;
  if (block.runs == 1 && block.stride == 1) {
    OPTIM_EXT_FOR(i, block.length) x[i] = narrowed(from[i]);
  } else {
    over_block(block, [=](int64_t i, int64_t at) __attribute__((always_inline)) { x[at] = narrowed(from[i]); });
  }
}

// The conversions of convert.h for as many bf16 numbers in a row as fill registers; returns how many. Compilers do not
// find these instructions.
template <class V>
OPTIM_EXT_INLINE int64_t widen_bf16s(const uint16_t*, V*, int64_t) {
  return 0;
}
template <class V>
OPTIM_EXT_INLINE int64_t narrow_bf16s(const V*, uint16_t*, int64_t) {
  return 0;
}
#if OPTIM_EXT_REGISTER_BYTES == 64
OPTIM_EXT_INLINE int64_t widen_bf16s(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    _mm512_storeu_si512(to + i, _mm512_slli_epi32(halves, 16));
  }
  return i;
}
OPTIM_EXT_INLINE int64_t narrow_bf16s(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 value = _mm512_loadu_ps(from + i);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(rounded));
  }
  return i;
}
#elif OPTIM_EXT_REGISTER_BYTES == 32
OPTIM_EXT_INLINE int64_t widen_bf16s(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)));
  }
  return i;
}
OPTIM_EXT_INLINE int64_t narrow_bf16s(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256i rounded[2];
    for (int h = 0; h < 2; ++h) {
      const __m256 value = _mm256_loadu_ps(from + i + 8 * h);
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
      const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      rounded[h] = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    }
    // Packing works on each half of the registers on its own: put the quarters back in order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), packed);
  }
  return i;
}
#endif

template <class V>
OPTIM_EXT_INLINE void widen(const void* from, Storage storage, const Block& block, V* to) {
  const auto* const halves = static_cast<const uint16_t*>(from);
  switch (storage) {
    case Storage::f32: return widen_block(static_cast<const float*>(from), block, to, [](float x) { return x; });
    case Storage::f64: return widen_block(static_cast<const double*>(from), block, to, [](double x) { return x; });
    case Storage::bf16: {
      const auto wide = [](uint16_t x) { return widen_bf16(x); };
      if (block.runs != 1 || block.stride != 1) return widen_block(halves, block, to, wide);
      const int64_t done = widen_bf16s(halves, to, block.length);
      return widen_block(halves + done, {1, block.length - done, 1, 1}, to + done, wide);
    }
    case Storage::f16: return widen_block(halves, block, to, [](uint16_t x) { return widen_f16(x); });
  }
}

template <class V>
OPTIM_EXT_INLINE void narrow(const V* from, void* to, Storage storage, const Block& block) {
  auto* const halves = static_cast<uint16_t*>(to);
  switch (storage) {
    case Storage::f32:
      return narrow_block(from, static_cast<float*>(to), block, [](V x) { return static_cast<float>(x); });
    case Storage::f64:
      return narrow_block(from, static_cast<double*>(to), block, [](V x) { return static_cast<double>(x); });
    case Storage::bf16: {
      const auto narrowed = [](V x) { return narrow_bf16(static_cast<float>(x)); };
      if (block.runs != 1 || block.stride != 1) return narrow_block(from, halves, block, narrowed);
      const int64_t done = narrow_bf16s(from, halves, block.length);
      return narrow_block(from + done, halves + done, {1, block.length - done, 1, 1}, narrowed);
    }
    case Storage::f16: return narrow_block(from, halves, block, [](V x) { return narrow_f16(static_cast<float>(x)); });
  }
}

// One operand's share of a tile: a pointer to V, which is the memory itself wherever that is possible.
template <class V>
struct TileOperand {
  void* data = nullptr;
  Storage storage = Storage::f32;
  const Layout* layout = nullptr;  // null: dense, also among others that are not
  int operand = 0;

  TileOperand() = default;
  OPTIM_EXT_INLINE TileOperand(const Bundle& bundle, int k)
      : data(bundle.data[k]), storage(bundle.storage[k]), operand(k) {
    if (bundle.layout != nullptr && !bundle.layout->is_dense(k)) layout = bundle.layout;
  }

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
    if (layout == nullptr) return widen(at(start), storage, {1, n, 1, 1}, buffer);
    if (layout->firsts != nullptr && operand == kGradOperand) return load_sums(start, n, buffer);
    walk(start, n,
         [&](int64_t i, int64_t offset, const Block& block) { widen(at(offset), storage, block, buffer + i); });
  }

  OPTIM_EXT_SHARED void store(int64_t start, int64_t n, const V* buffer) const {
    if (layout == nullptr) return narrow(buffer, at(start), storage, {1, n, 1, 1});
    walk(start, n,
         [&](int64_t i, int64_t offset, const Block& block) { narrow(buffer + i, at(offset), storage, block); });
  }

  // The same for rows of a sparse gradient that lie anywhere in memory, or in several places.
  OPTIM_EXT_INLINE void load_sums(int64_t start, int64_t n, V* buffer) const {
    V term[kTile];
    const int64_t width = layout->sizes[1];
    int64_t row = start / width, column = start - row * width;
    for (int64_t i = 0, count; i < n; i += count, ++row, column = 0) {
      count = width - column < n - i ? width - column : n - i;
      int64_t source = layout->firsts[row];
      widen(at(layout->sources[source] * width + column), storage, {1, count, 1, 1}, buffer + i);
      while (++source < layout->firsts[row + 1]) {
        widen(at(layout->sources[source] * width + column), storage, {1, count, 1, 1}, term);
        V* const sum = buffer + i;
        OPTIM_EXT_FOR(e, count) sum[e] = sum[e] + term[e];
      }
    }
  }

  // Visits n elements from `start` in blocks of whole runs, and parts of a run at either end. Only the first place is
  // found by division.
  template <class Visit>
  OPTIM_EXT_INLINE void walk(int64_t start, int64_t n, const Visit& visit) const {
    int64_t place[kMaxDims], offset = layout->locate(operand, start, place);
    const int last = layout->ndim - 1;
    const int64_t length = layout->sizes[last], stride = layout->strides[operand][last];
    // Runs that lie anywhere are visited one by one.
    const bool even = last > 0 && (last > 1 || (layout->rows == nullptr && layout->outer == nullptr));
    const int64_t most = even ? layout->sizes[last - 1] : 1, run_stride = even ? layout->strides[operand][last - 1] : 0;
    for (int64_t i = 0; i < n;) {
      Block block{1, n - i < length - place[last] ? n - i : length - place[last], run_stride, stride};
      if (place[last] == 0 && n - i >= length) {
        const int64_t left = even ? most - place[last - 1] : 1, whole = (n - i) / length;
        block.runs = left < whole ? left : whole;
      }
      visit(i, offset, block);
      i += block.runs * block.length;
      offset = layout->skip_runs(operand, offset - place[last] * stride, place, block.runs);
      place[last] = 0;
    }
  }
};

// Operand I of element i: for the gradient a value of the rule's own, for one that this variant of the rule does not
// have a scratch value.
template <class Rule, class V, int I>
OPTIM_EXT_INLINE decltype(auto) element(V* const* tile, int64_t i, V& scratch, V grad_factor) {
  if constexpr (I == kGradOperand) {
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

// The same for operands that are all stored as bf16: widened and narrowed in registers, as there is more arithmetic to
// that than memory to wait for.
template <class Rule, int... I>
OPTIM_EXT_INLINE void apply_to_bf16(const Rule& given, void* const* data, int64_t start, int64_t n, float grad_factor,
                                    Indices<I...>) {
  const Rule rule = given;
  uint16_t* const tile[] = {((Rule::kUsed >> I) & 1u ? static_cast<uint16_t*>(data[I]) + start : nullptr)...};
  OPTIM_EXT_FOR(i, n) {
    float value[] = {((Rule::kUsed >> I) & 1u ? widen_bf16(tile[I][i]) : 0.0f)...};
    value[kGradOperand] *= grad_factor;
    rule(value[I]...);
    ((((Rule::kUpdates >> I) & 1u) ? static_cast<void>(tile[I][i] = narrow_bf16(value[I])) : void()), ...);
  }
}

// Rows lie anywhere in a table larger than the caches: they are asked for before it is their turn.
constexpr int64_t kRowsAhead = 8, kLine = 64, kLinesAhead = 8;

template <class Rule>
OPTIM_EXT_INLINE void fetch_row(const Bundle& bundle, int64_t n) {
  const Layout& layout = *bundle.layout;
  for (int k = 0; k < Rule::kOperands; ++k) {
    if (!((Rule::kUsed >> k) & 1u)) continue;
    const int64_t bytes = layout.sizes[1] * bytes_of(bundle.storage[k]);
    const int64_t place = k != kGradOperand          ? layout.rows[n]
                          : layout.firsts != nullptr ? layout.sources[layout.firsts[n]]
                                                     : n;
    const char* const row = static_cast<const char*>(bundle.data[k]) + place * bytes;
    for (int64_t at = 0; at < bytes && at < kLinesAhead * kLine; at += kLine) __builtin_prefetch(row + at, 1);
  }
}

// Elements [begin, end) of the rows of a sparse gradient, one row after the other, where nothing needs converting.
template <class Rule, class V>
OPTIM_EXT_INLINE void sweep_rows(const Rule& given, const Bundle& bundle, int64_t begin, int64_t end, V grad_factor) {
  constexpr typename MakeIndices<Rule::kOperands>::type kAll;
  const Rule rule = given;
  const Layout layout = *bundle.layout;
  const int64_t width = layout.sizes[1], last = layout.sizes[0] - 1;
  const TileOperand<V> grads(bundle, kGradOperand);
  alignas(64) V buffer[kTile];
  V* data[Rule::kOperands];
  for (int k = 0; k < Rule::kOperands; ++k) data[k] = static_cast<V*>(bundle.data[k]);
  int64_t row = begin / width, column = begin - row * width;
  for (int64_t start = begin, n; start < end; start += n) {
    if (column == 0) fetch_row<Rule>(bundle, row + kRowsAhead < last ? row + kRowsAhead : last);
    n = width - column < end - start ? width - column : end - start;
    V* tile[Rule::kOperands];
    for (int k = 0; k < Rule::kOperands; ++k) tile[k] = data[k] + layout.rows[row] * width + column;
    if (layout.firsts == nullptr) {
      tile[kGradOperand] = data[kGradOperand] + start;
    } else if (layout.firsts[row + 1] == layout.firsts[row] + 1) {
      tile[kGradOperand] = data[kGradOperand] + layout.sources[layout.firsts[row]] * width + column;
    } else {
      n = n < kTile ? n : kTile;
      grads.load(start, n, buffer);
      tile[kGradOperand] = buffer;
    }
    apply<Rule, V>(rule, tile, n, grad_factor, [](int64_t) __attribute__((always_inline)) {}, kAll);
    column += n;
    if (column == width) {
      column = 0;
      ++row;
    }
  }
}

// Whether the fastest dimension of a layout is walked in runs that are one piece of memory in every operand, long
// enough to be updated where they are, and that nothing needs converting.
constexpr int64_t kLeastRun = 8, kLeastRuns = 8;

template <class Rule, class V>
OPTIM_EXT_INLINE bool has_runs(const Bundle& bundle) {
  const Layout& layout = *bundle.layout;
  const int last = layout.ndim - 1;
  bool fits = layout.rows == nullptr && layout.outer == nullptr && last > 0 && layout.sizes[last] >= kLeastRun &&
              layout.sizes[last - 1] >= kLeastRuns;
  for (int k = 0; k < Rule::kOperands; ++k) {
    if ((Rule::kUsed >> k) & 1u) fits = fits && bundle.storage[k] == kNative<V> && layout.strides[k][last] == 1;
  }
  return fits;
}

template <class Rule, class V>
OPTIM_EXT_INLINE void sweep_runs(const Rule& given, const Bundle& bundle, int64_t begin, int64_t end, V grad_factor) {
  constexpr typename MakeIndices<Rule::kOperands>::type kAll;
  const Rule rule = given;
  const Layout& layout = *bundle.layout;
  const int last = layout.ndim - 1;
  const int64_t length = layout.sizes[last], runs = layout.sizes[last - 1];
  for (int64_t start = begin; start < end;) {
    int64_t run = start / length, column = start - run * length;
    run %= runs;
    V* tile[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUsed >> k) & 1u) tile[k] = static_cast<V*>(bundle.data[k]) + layout.offset(k, start);
    }
    for (; run < runs && start < end; ++run, column = 0) {
      const int64_t n = length - column < end - start ? length - column : end - start;
      apply<Rule, V>(rule, tile, n, grad_factor, [](int64_t) __attribute__((always_inline)) {}, kAll);
      start += n;
      for (int k = 0; k < Rule::kOperands; ++k) {
        if ((Rule::kUsed >> k) & 1u) tile[k] += layout.strides[k][last - 1] - column;
      }
    }
  }
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
  if (bundle.layout != nullptr && !pass.unscale && has_runs<Rule, V>(bundle))
    return sweep_runs<Rule, V>(rule, bundle, begin, end, V(pass.grad_factor));
  const bool averages = bundle.average != nullptr && averages_in_loop(bundle);
  // Where there are short runs, tiles hold whole ones.
  const int64_t run = bundle.layout != nullptr ? bundle.layout->sizes[bundle.layout->ndim - 1] : 1;
  const int64_t length = all_in_place ? end - begin : run <= kTile ? kTile - kTile % run : kTile;
  const int64_t in_first = run <= kTile ? begin % run : 0;
  for (int64_t start = begin, n; start < end; start += n) {
    n = start == begin && !all_in_place ? length - in_first : length;
    if (n > end - start) n = end - start;
    V* tile[Rule::kOperands] = {};
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

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
