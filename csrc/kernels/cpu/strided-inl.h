// Operands that are not dense in one order, where they are and without buffers for all of them. Compiled once per
// instruction set, as sweep-inl.h, whose part it is.

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// How the elements of strided operands come to the rule.
enum class Way {
  tiles,  // through buffers: they need converting, turning, or more arithmetic than one element at a time is good for
  runs,   // where they are: runs of the fastest dimension are one piece of memory in every operand, and long enough
  each,   // where they are, one by one: there is less to compute than to move
  blocks  // block by block of two dimensions, of which some operands have the one and some the other in a row
};
constexpr int64_t kLeastRun = 8, kLeastRuns = 8;    // elements of a run, and runs, that are worth a loop of their own
constexpr int kFew = 3, kFewShort = 2;              // operands, above which elements are not taken one by one
constexpr int kManyGaps = 2;                        // operands with gaps between short runs: buffers cost more then
constexpr int kSingly = 5;                          // elements of a run that are not worth a register
constexpr int64_t kManyRuns = 64;                   // short ones taken together: their cache lines stay in L1 meanwhile
constexpr int64_t kBlock = 4096, kBlockWidth = 64;  // elements of a block, and most of them in a row

template <class Rule>
constexpr int count_of_used = __builtin_popcount(Rule::kUsed);

template <class Rule, class V>
OPTIM_EXT_INLINE Way way_to(const Bundle& bundle) {
  const Layout& layout = *bundle.layout;
  const int last = layout.ndim - 1;
  if (layout.rows != nullptr || layout.outer != nullptr) return Way::tiles;
  const bool squares = last > 0 && layout.sizes[last] >= Square<V>::kRows && layout.sizes[last - 1] >= Square<V>::kRows;
  bool pieces = last > 0 && layout.sizes[last] >= kLeastRun && layout.sizes[last - 1] >= kLeastRuns;
  bool blocks = squares, turned = false;
  int gaps = 0;
  for (int k = 0; k < Rule::kOperands; ++k) {
    if (!((Rule::kUsed >> k) & 1u)) continue;
    if (bundle.storage[k] != kNative<V>) return Way::tiles;
    const int64_t stride = layout.strides[k][last], run_stride = last > 0 ? layout.strides[k][last - 1] : 0;
    gaps += run_stride != layout.sizes[last] * stride;
    const bool is_turned = squares && stride > 1 && run_stride == 1;
    pieces = pieces && stride == 1;
    turned = turned || is_turned;
    blocks = blocks && (is_turned || (stride == 1 && run_stride > 1));
  }
  if (pieces) return Way::runs;
  if (turned) return blocks ? Way::blocks : Way::tiles;
  const bool is_short = last > 0 && layout.sizes[last] < kLeastRun;
  return count_of_used<Rule> <= (is_short && gaps < kManyGaps ? kFewShort : kFew) ? Way::each : Way::tiles;
}

// Where a rule moves more than it computes, elements that do not follow each other are not gathered into registers: the
// order in which that asks for cache lines is not one the hardware foresees. Compilers do not look across an asm.
template <class Rule>
OPTIM_EXT_INLINE void keep_apart() {
  if constexpr (count_of_used<Rule> <= kFewShort) asm volatile("");
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
    keep_apart<Rule>();
  }
}

// Runs of kLength elements, each of them one piece of memory in every operand.
template <int kLength, class Rule, class V, int... I>
OPTIM_EXT_INLINE void apply_to_runs(const Rule& given, V* const* tile, const int64_t* given_strides, int64_t runs,
                                    V grad_factor, Indices<I...>) {
  const Rule rule = given;
  const int64_t strides[] = {given_strides[I]...};
  V* at[] = {tile[I]...};
  for (int64_t r = 0; r < runs; ++r) {
    for (int e = 0; e < kLength; ++e) {
      V scratch = V(0);
      rule(element<Rule, V, I>(at, e, scratch, grad_factor)...);
      if constexpr (kLength <= kSingly) keep_apart<Rule>();
    }
    ((at[I] += ((Rule::kUsed >> I) & 1u) ? strides[I] : 0), ...);
  }
}

// Whether there is a loop of its own for runs of this length; it has then been run.
template <class Rule, class V>
OPTIM_EXT_INLINE bool apply_to_short_runs(const Rule& rule, V* const* tile, const int64_t* strides, int64_t length,
                                          int64_t runs, V grad_factor) {
  constexpr typename MakeIndices<Rule::kOperands>::type kAll;
  if constexpr (count_of_used<Rule> > kFew) {
    return false;
  }
  switch (length) {
    case 2: apply_to_runs<2, Rule, V>(rule, tile, strides, runs, grad_factor, kAll); return true;
    case 3: apply_to_runs<3, Rule, V>(rule, tile, strides, runs, grad_factor, kAll); return true;
    case 4: apply_to_runs<4, Rule, V>(rule, tile, strides, runs, grad_factor, kAll); return true;
    case 5: apply_to_runs<5, Rule, V>(rule, tile, strides, runs, grad_factor, kAll); return true;
    case 6: apply_to_runs<6, Rule, V>(rule, tile, strides, runs, grad_factor, kAll); return true;
    case 7: apply_to_runs<7, Rule, V>(rule, tile, strides, runs, grad_factor, kAll); return true;
    default: return false;
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
  bool in_pieces = true;
  for (int k = 0; k < Rule::kOperands; ++k) {
    if (!((Rule::kUsed >> k) & 1u)) continue;
    strides[k] = layout.strides[k][last];
    run_strides[k] = last > 0 ? layout.strides[k][last - 1] : 0;
    in_pieces &= strides[k] == 1;
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
        many = (end - start) / length < runs - run ? (end - start) / length : runs - run;
        if (!in_pieces || !apply_to_short_runs<Rule, V>(rule, tile, run_strides, length, many, grad_factor)) {
          // The first elements of many short runs, then the second ones, and so on.
          many = many < kManyRuns ? many : kManyRuns;
          V* each[Rule::kOperands] = {};
          for (int k = 0; k < Rule::kOperands; ++k) each[k] = tile[k];
          for (int64_t e = 0; e < length; ++e) {
            apply_to_each<Rule, V>(rule, each, run_strides, many, grad_factor, kAll);
            for (int k = 0; k < Rule::kOperands; ++k) each[k] += (Rule::kUsed >> k) & 1u ? strides[k] : 0;
          }
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

// Blocks of the two fastest dimensions, one after the other: of whole rows of one plane, or of a part of one row where
// the range begins or ends within it.
class Blocks {
 public:
  int64_t wide, high;

  Blocks(const Layout& layout, int64_t begin, int64_t end, int64_t least)
      : layout_(layout), columns_(layout.sizes[layout.ndim - 1]), rows_(layout.sizes[layout.ndim - 2]), end_(end) {
    // As wide as few rows allow, and not so narrow that turning many rows leaves parts of cache lines behind.
    const int64_t few = rows_ < kBlockWidth ? rows_ : kBlockWidth, room = kBlock / few - kBlock / few % kBlockWidth;
    most_wide_ = columns_ < room ? columns_ : room;
    most_high_ = kBlock / most_wide_ - kBlock / most_wide_ % least;
    open(begin);
  }

  bool is_over() const { return start_ >= end_; }

  void go_on() {
    first_ += wide;
    if (first_ < length_) {
      narrow();
    } else {
      open(start_ + length_ * high);
    }
  }

  // Where the block begins in an operand.
  template <class V>
  V* in(V* data, int k) const {
    return data + layout_.offset(k, start_) + first_ * layout_.strides[k][layout_.ndim - 1];
  }

 private:
  void open(int64_t start) {
    start_ = start;
    if (is_over()) return;
    const int64_t column = start % columns_, row = start / columns_ % rows_, whole = (end_ - start) / columns_;
    length_ = columns_ - column < end_ - start ? columns_ - column : end_ - start;
    high = 1;
    if (length_ == columns_) {
      high = whole < rows_ - row ? whole : rows_ - row;
      high = high < most_high_ ? high : most_high_;
    }
    first_ = 0;
    narrow();
  }
  void narrow() { wide = length_ - first_ < most_wide_ ? length_ - first_ : most_wide_; }

  const Layout& layout_;
  int64_t columns_, rows_, end_, most_wide_, most_high_;
  int64_t start_ = 0, length_ = 0, first_ = 0;  // of the rows' parts: the first's first element, elements, those done
};

// An operand that has the last dimension but one in a row is turned on its way into a buffer and out of it; the others
// are taken where they are. What lies across is in pieces of memory that are too short for the hardware to fetch ahead,
// so each block asks for the next one, a little with every square and row: all at once would have to be waited for.
template <class Rule, class V>
OPTIM_EXT_SHARED void sweep_blocks(const Rule& given, const Bundle& bundle, int64_t begin, int64_t end, V grad_factor) {
  constexpr typename MakeIndices<Rule::kOperands>::type kAll;
  constexpr auto kNothing = [](int64_t) __attribute__((always_inline)) {};
  const Rule rule = given;
  const Layout& layout = *bundle.layout;
  const int last = layout.ndim - 1;
  alignas(64) V buffer[Rule::kOperands][kBlock];
  Blocks next(layout, begin, end, Square<V>::kRows);
  V* next_at[Rule::kOperands] = {};
  const auto find_next = [&] {
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUsed >> k) & 1u) next_at[k] = next.in(static_cast<V*>(bundle.data[k]), k);
    }
  };
  for (find_next(); !next.is_over();) {
    const int64_t wide = next.wide, high = next.high;
    V *tile[Rule::kOperands] = {}, *in_memory[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) tile[k] = in_memory[k] = next_at[k];
    next.go_on();
    if (!next.is_over()) find_next();
    int64_t steps[Rule::kOperands] = {}, ahead[Rule::kOperands] = {};  // from row to row, and to the next block
    bool in_one = true;                                                // the rows of the block follow each other
    for (int k = 0; k < Rule::kOperands; ++k) {
      if (!((Rule::kUsed >> k) & 1u)) continue;
      const int64_t stride = layout.strides[k][last];
      steps[k] = layout.strides[k][last - 1];
      ahead[k] = next_at[k] - in_memory[k];
      if (stride != 1) {
        const V* const from = in_memory[k] + ahead[k];
        transpose(in_memory[k], stride, buffer[k], wide, high, wide,
                  [=](int64_t r, int64_t c)
                      __attribute__((always_inline)) { fetch_square(from + c * stride + r, stride, r); });
        tile[k] = buffer[k];
        steps[k] = wide;
        ahead[k] = 0;
      }
      in_one = in_one && (steps[k] == wide || high == 1);
    }
    const int64_t times = in_one ? 1 : high, n = in_one ? high * wide : wide;
    for (int64_t r = 0; r < times; ++r) {
      for (int k = 0; k < Rule::kOperands; ++k) {
        if (ahead[k] == 0 || in_one) continue;
        for (int64_t i = 0; i < n; i += kLine / static_cast<int64_t>(sizeof(V)))
          __builtin_prefetch(tile[k] + ahead[k] + i, 1, 2);
      }
      apply<Rule, V>(rule, tile, n, grad_factor, kNothing, kAll);
      for (int k = 0; k < Rule::kOperands; ++k) tile[k] += (Rule::kUsed >> k) & 1u ? steps[k] : 0;
    }
    for (int k = 0; k < Rule::kOperands; ++k) {
      const int64_t stride = layout.strides[k][last];
      if (!((Rule::kUpdates >> k) & 1u) || stride == 1) continue;
      transpose(buffer[k], wide, in_memory[k], stride, wide, high,
                [=](int64_t r, int64_t c) __attribute__((always_inline)) {
                  for (int d = 0; d < Rule::kOperands; ++d) {
                    if (ahead[d] != 0 && in_one) fetch_square(in_memory[d] + ahead[d] + c * steps[d] + r, steps[d], r);
                  }
                });
    }
  }
}

}  // namespace

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
