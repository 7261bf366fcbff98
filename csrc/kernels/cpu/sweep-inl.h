// The CPU loop, compiled once per instruction set inside the namespace OPTIM_EXT_ISA (for_each_isa.h). No include
// guard, no torch, and nothing for other files to link with: what is not inlined is in that namespace, so no code built
// for AVX-512 can be linked into a baseline caller.

#include "moves-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// What every sweep calls and none needs a copy of: not inlined, but in the unnamed namespace.
#define OPTIM_EXT_SHARED __attribute__((noinline))

constexpr int64_t kLine = 64, kFetched = 32;  // bytes of a cache line, and how many are asked for ahead
constexpr int64_t kLongestPiece = 1 << 15;    // elements

// The first element of a tile. What divisions find out about it is found once for all operands.
struct Start {
  int64_t index;
  int64_t places[kMaxDims];

  OPTIM_EXT_INLINE Start(const Layout* layout, int64_t at) : index(at) {
    if (layout != nullptr) layout->find(at, places);
  }
};

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

  OPTIM_EXT_INLINE V* open(const Start& start, int64_t n, V* buffer) const {
    if (in_place()) return static_cast<V*>(data) + start.index;
    load(start, n, buffer);
    return buffer;
  }

  OPTIM_EXT_INLINE void close(const Start& start, int64_t n, const V* buffer) const {
    if (!in_place()) store(start, n, buffer);
  }

  OPTIM_EXT_SHARED void load(const Start& start, int64_t n, V* buffer) const {
    if (layout == nullptr) return widen(at(start.index), storage, {1, n, 1, 1}, buffer);
    if (layout->firsts != nullptr && operand == kGradOperand) return load_sums(start.index, n, buffer);
    walk(start, n,
         [&](int64_t i, int64_t offset, const Block& block) { widen(at(offset), storage, block, buffer + i); });
  }

  OPTIM_EXT_SHARED void store(const Start& start, int64_t n, const V* buffer) const {
    if (layout == nullptr) return narrow(buffer, at(start.index), storage, {1, n, 1, 1});
    walk(start, n,
         [&](int64_t i, int64_t offset, const Block& block) { narrow(buffer + i, at(offset), storage, block); });
  }

  // Asks for a tile that is read some tiles from now, where the order of memory is not that of the walk: what walk()
  // begins with from `start`, or as much as the tile has of the dense piece of memory that comes `ahead` of it.
  OPTIM_EXT_INLINE void fetch(const Start& start, int64_t n, int64_t ahead) const {
    if (layout == nullptr || layout->rows != nullptr || layout->outer != nullptr || layout->ndim < 2) return;
    if (ahead > 0) {
      const char* const from = static_cast<const char*>(at(start.index + ahead));
      for (int64_t i = 0; i < n * bytes_of(storage); i += kLine) __builtin_prefetch(from + i, 1);
      return;
    }
    const int last = layout->ndim - 1;
    const int64_t* const strides = layout->strides[operand];
    if (strides[last] == 1 || strides[last - 1] != 1) return;
    const char* const from = static_cast<const char*>(at(layout->offset_at(operand, start.places)));
    for (int64_t i = 0; i < layout->sizes[last] && i < kFetched; ++i)
      __builtin_prefetch(from + i * strides[last] * bytes_of(storage), 1);
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
  OPTIM_EXT_INLINE void walk(const Start& start, int64_t n, const Visit& visit) const {
    const int last = layout->ndim - 1;
    int64_t place[kMaxDims], offset = layout->offset_at(operand, start.places);
    for (int d = 0; d <= last; ++d) place[d] = start.places[d];
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
constexpr int64_t kRowsAhead = 8, kLinesAhead = 8;

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
      grads.load(Start(nullptr, start), n, buffer);
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

// How the elements of strided operands come to the rule.
enum class Way {
  tiles,  // through buffers: they need converting, turning, or more arithmetic than one element at a time is good for
  runs,   // where they are: runs of the fastest dimension are one piece of memory in every operand, and long enough
  each    // where they are, one by one: there is less to compute than to move
};
constexpr int64_t kLeastRun = 8, kLeastRuns = 8;  // elements of a run, and runs, that are worth a loop of their own
constexpr int kFew = 3;                           // operands, above which elements are not taken one by one
constexpr int64_t kManyRuns = 64;                 // short ones taken together: their cache lines stay in L1 meanwhile

template <class Rule>
constexpr int count_of_used = __builtin_popcount(Rule::kUsed);

template <class Rule, class V>
OPTIM_EXT_INLINE Way way_to(const Bundle& bundle) {
  const Layout& layout = *bundle.layout;
  const int last = layout.ndim - 1;
  if (layout.rows != nullptr || layout.outer != nullptr) return Way::tiles;
  bool pieces = last > 0 && layout.sizes[last] >= kLeastRun && layout.sizes[last - 1] >= kLeastRuns, turned = false;
  for (int k = 0; k < Rule::kOperands; ++k) {
    if (!((Rule::kUsed >> k) & 1u)) continue;
    if (bundle.storage[k] != kNative<V>) return Way::tiles;
    pieces = pieces && layout.strides[k][last] == 1;
    turned = turned || (last > 0 && layout.strides[k][last] != 1 && layout.strides[k][last - 1] == 1 &&
                        layout.sizes[last] >= Square<V>::kRows && layout.sizes[last - 1] >= Square<V>::kRows &&
                        layout.sizes[last] * Square<V>::kRows <= kTile);
  }
  if (pieces) return Way::runs;
  const bool is_short = last > 0 && layout.sizes[last] < kLeastRun;
  return count_of_used<Rule> <= (is_short ? 2 : kFew) && !turned ? Way::each : Way::tiles;
}

template <class Rule, class V, int... I>
OPTIM_EXT_INLINE void apply_to_each(const Rule& rule, V* const* tile, const int64_t* given_strides, int64_t n,
                                    V grad_factor, Indices<I...>) {
  const int64_t strides[] = {given_strides[I]...};
  V* const data[] = {tile[I]...};
  for (int64_t i = 0; i < n; ++i) {
    V scratch = V(0);
    V* const at[] = {(((Rule::kUsed >> I) & 1u) ? data[I] + i * strides[I] : &scratch)...};
    rule(element<Rule, V, I>(at, 0, scratch, grad_factor)...);
  }
}

template <class Rule, class V, Way kWay>
OPTIM_EXT_INLINE void sweep_runs(const Rule& given, const Bundle& bundle, int64_t begin, int64_t end, V grad_factor) {
  constexpr typename MakeIndices<Rule::kOperands>::type kAll;
  const Rule rule = given;
  const Layout& layout = *bundle.layout;
  const int last = layout.ndim - 1;
  const int64_t length = layout.sizes[last], runs = last > 0 ? layout.sizes[last - 1] : 1;
  int64_t strides[Rule::kOperands] = {}, run_strides[Rule::kOperands] = {};
  for (int k = 0; k < Rule::kOperands; ++k) {
    if (!((Rule::kUsed >> k) & 1u)) continue;
    strides[k] = layout.strides[k][last];
    run_strides[k] = last > 0 ? layout.strides[k][last - 1] : 0;
  }
  for (int64_t start = begin; start < end;) {
    int64_t run = start / length, column = start - run * length;
    run %= runs;
    V* tile[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUsed >> k) & 1u) tile[k] = static_cast<V*>(bundle.data[k]) + layout.offset(k, start);
    }
    for (int64_t many; run < runs && start < end; run += many, column = 0) {
      int64_t n = length - column < end - start ? length - column : end - start;
      many = 1;
      if constexpr (kWay == Way::runs) {
        apply<Rule, V>(rule, tile, n, grad_factor, [](int64_t) __attribute__((always_inline)) {}, kAll);
      } else if (length >= kLeastRun || n < length) {
        apply_to_each<Rule, V>(rule, tile, strides, n, grad_factor, kAll);
      } else {
        // The first elements of many short runs, then the second ones, and so on.
        many = (end - start) / length < runs - run ? (end - start) / length : runs - run;
        many = many < kManyRuns ? many : kManyRuns;
        V* each[Rule::kOperands] = {};
        for (int k = 0; k < Rule::kOperands; ++k) each[k] = tile[k];
        for (int64_t e = 0; e < length; ++e) {
          apply_to_each<Rule, V>(rule, each, run_strides, many, grad_factor, kAll);
          for (int k = 0; k < Rule::kOperands; ++k) each[k] += (Rule::kUsed >> k) & 1u ? strides[k] : 0;
        }
        n *= many;
      }
      start += n;
      for (int k = 0; k < Rule::kOperands; ++k) {
        if ((Rule::kUsed >> k) & 1u) tile[k] += many * run_strides[k] - column * strides[k];
      }
    }
  }
}

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
