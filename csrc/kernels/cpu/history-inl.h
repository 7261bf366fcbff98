// The loops of L-BFGS over tiles of its history, compiled once per instruction set as sweep-inl.h is.
#include "sweep-inl.h"
#include "lanes-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// Tiles a group of rows is followed through before the next group has its turn: the hardware fetches ahead along a row
// only where it is read for longer than a tile, and the vectors that every group needs have to stay in the cache. The
// order of additions is that of the tiles, whatever this number is.
constexpr int64_t kStretch = 16;

// Asks for what will be read after the `count` elements at `from`, which belong to one of kRows rows that are read side
// by side. The hardware does not fetch ahead far enough by itself: long histories are read a third faster with this.
constexpr int64_t kAheadOfAllRows = 8192, kLineBytes = 64;
template <int kRows, class Row>
OPTIM_EXT_INLINE void fetch_ahead(const Row* from, int64_t count) {
  // A number, as near the end of a row it is beyond what a pointer into the row may point to.
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(from) + kAheadOfAllRows / kRows;
  for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(Row)); at += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<uintptr_t>(at)));
  }
}

// Dot products of kRows rows with kColumns vectors over the n elements of a tile.
template <int kRows, class Row, class... Columns>
OPTIM_EXT_INLINE void dot_rows(const Row* const* rows, int64_t n, double* sums, const Columns*... columns) {
  constexpr int kColumns = sizeof...(Columns);
  Lanes lanes[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) lanes[r][c].clear();
  }
  const auto add = [&](const Row* const* from, int64_t i, const Columns*... with) __attribute__((always_inline)) {
    for (int p = 0; p < kUnroll / kPack; p += 2) {
      const TwoPacks vector[] = {widen_two_for<Row>(with + i + p * kPack)...};
      for (int r = 0; r < kRows; ++r) {
        if (p == 0) fetch_ahead<kRows>(from[r] + i, kUnroll);
        const TwoPacks row = widen_two(from[r] + i + p * kPack);
        for (int h = 0; h < 2; ++h) {
          int c = 0;
          ((lanes[r][c].pack[sum_of<Row>(p, h)] =
                add_product<Row, Columns>(row.pack[h], vector[c].pack[h], lanes[r][c].pack[sum_of<Row>(p, h)]),
            ++c),
           ...);
        }
      }
    }
  };
  int64_t i = 0;
  for (; i + kUnroll <= n; i += kUnroll) add(rows, i, columns...);
  if (i < n) {
    Row row_rest[kRows][kUnroll];
    const Row* rest[kRows];
    for (int r = 0; r < kRows; ++r) rest[r] = padded(rows[r] + i, n - i, row_rest[r]);
    add(rest, 0, padded(columns + i, n - i, Rest<Columns>().element)...);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sums[r * kColumns + c] = lanes[r][c].sum();
  }
}

// Rows at a time: as many as there are registers for their sums.
template <int kColumns>
constexpr int kRowBlock = (OPTIM_EXT_REGISTER_BYTES == 64 ? 16 : 8) / kPacks / kColumns > 0
                              ? (OPTIM_EXT_REGISTER_BYTES == 64 ? 16 : 8) / kPacks / kColumns
                              : 1;

// Calls work<kRows>(first row) for all of `count` rows, kRows at a time: kMost as long as there are so many, then half
// of it, and so on. Rows read one by one would keep the memory waiting.
template <int kMost, class Work>
OPTIM_EXT_INLINE void in_blocks(int64_t count, const Work& work, int64_t row = 0) {
  for (; row + kMost <= count; row += kMost) work.template operator()<kMost>(row);
  if constexpr (kMost > 1) in_blocks<kMost / 2>(count, work, row);
}

// The tiles of a stretch: they begin at element `start`, `count` elements in all.
struct Stretch {
  int64_t start, count;
  OPTIM_EXT_INLINE int64_t tile_size(int64_t i) const { return count - i < kHistoryTile ? count - i : kHistoryTile; }
};

// Products of kRows rows with the columns, which begin at the stretch; `sums` are those of its first tile, `width` of
// them per tile.
template <int kRows, class Row, class... Columns>
OPTIM_EXT_INLINE void dot_stretch(void* const* rows, const Stretch& stretch, double* sums, int64_t width,
                                  const Columns*... columns) {
  for (int64_t i = 0; i < stretch.count; i += kHistoryTile, sums += width) {
    const Row* block[kRows];
    for (int r = 0; r < kRows; ++r) block[r] = static_cast<const Row*>(rows[r]) + stretch.start + i;
    dot_rows<kRows>(block, stretch.tile_size(i), sums, (columns + i)...);
  }
}

template <class Row, class... Columns>
OPTIM_EXT_INLINE void dot_all(void* const* rows, int64_t count, const Stretch& stretch, double* sums, int64_t width,
                              const Columns*... columns) {
  constexpr int kColumns = sizeof...(Columns);
  in_blocks<kRowBlock<kColumns>>(count, [&]<int kRows>(int64_t r) __attribute__((always_inline)) {
    dot_stretch<kRows, Row>(rows + r, stretch, sums + r * kColumns, width, columns...);
  });
}

template <class V, class Row>
OPTIM_EXT_INLINE void form_pair(const HistoryDots& task, const Stretch& stretch) {
  const rules::LbfgsPair pair = task.pair;
  const V* const grad = static_cast<const V*>(task.grad) + stretch.start;
  const V* const prev_grad = static_cast<const V*>(task.prev_grad) + stretch.start;
  const V* const d = static_cast<const V*>(task.d) + stretch.start;
  Row* const y = static_cast<Row*>(task.history.old_dirs[task.history.count - 1]) + stretch.start;
  Row* const s = static_cast<Row*>(task.history.old_stps[task.history.count - 1]) + stretch.start;
  OPTIM_EXT_FOR(i, stretch.count) {
    V to_y = prev_grad[i], to_s = d[i];
    pair(grad[i], to_y, to_s);
    store(&y[i], to_y);
    store(&s[i], to_s);
  }
}

// The columns are the gradient and, where asked for, the newest old_dirs row.
template <class V, class Row, class... Difference>
OPTIM_EXT_INLINE void dot_columns(const HistoryDots& task, const Stretch& stretch, double* sums,
                                  const Difference*... difference) {
  const History& history = task.history;
  const int64_t width = task.sums();
  const V* const grad = static_cast<const V*>(task.grad) + stretch.start;
  double* const stps_sums = sums + history.count * task.columns();
  if (task.metric == nullptr) {
    dot_all<Row>(history.old_dirs, history.count, stretch, sums, width, grad, difference...);
  } else {
    const V* const metric = static_cast<const V*>(task.metric) + stretch.start;
    alignas(64) double weighted[1 + sizeof...(Difference)][kStretch * kHistoryTile];
    const auto weight = [&](auto* vector, double* to) {
      OPTIM_EXT_FOR(i, stretch.count) to[i] = as_double(vector[i]) * as_double(metric[i]);
    };
    weight(grad, weighted[0]);
    (weight(difference, weighted[1]), ...);
    dot_all<Row>(history.old_dirs, history.count, stretch, sums, width, static_cast<const double*>(weighted[0]),
                 (static_cast<void>(difference), static_cast<const double*>(weighted[1]))...);
  }
  dot_all<Row>(history.old_stps, history.count, stretch, stps_sums, width, grad, difference...);
}

// Calls work(stretch, its first tile) for stretches of tiles [first, last), all of about one length. The two sweeps of
// an iteration go in opposite directions: what one has read last may still be in the cache when the other begins.
enum class Direction { forwards, backwards };
template <Direction kDirection, class Work>
OPTIM_EXT_INLINE void in_stretches(int64_t numel, int64_t first, int64_t last, const Work& work) {
  const int64_t tiles = last - first, count = (tiles + kStretch - 1) / kStretch;
  for (int64_t step = 0; step < count; ++step) {
    const int64_t i = kDirection == Direction::forwards ? step : count - 1 - step;
    const int64_t tile = first + tiles * i / count, after = first + tiles * (i + 1) / count;
    const int64_t start = tile * kHistoryTile;
    const int64_t end = after * kHistoryTile < numel ? after * kHistoryTile : numel;
    work(Stretch{start, end - start}, tile);
  }
}

template <class V, class Row>
OPTIM_EXT_INLINE void dot_tiles(const HistoryDots& task, int64_t first, int64_t last, double* sums) {
  const auto work = [&](const Stretch& stretch, int64_t tile) __attribute__((always_inline)) {
    if (task.forms_pair) form_pair<V, Row>(task, stretch);
    double* const of_stretch = sums + tile * task.sums();
    if (task.with_difference) {
      const History& history = task.history;
      dot_columns<V, Row>(task, stretch, of_stretch,
                          static_cast<const Row*>(history.old_dirs[history.count - 1]) + stretch.start);
    } else {
      dot_columns<V, Row>(task, stretch, of_stretch);
    }
  };
  in_stretches<Direction::forwards>(task.numel, first, last, work);
}

// Adds kRows rows, each times its coefficient, to a stretch.
template <class Row, int kRows>
OPTIM_EXT_INLINE void add_rows(void* const* rows, const double* coefficients, const Stretch& stretch, double* sum) {
  const Row* from[kRows];
  Doubles factor[kRows];
  for (int r = 0; r < kRows; ++r) {
    from[r] = static_cast<const Row*>(rows[r]) + stretch.start;
    factor[r] = all_lanes(coefficients[r]);
  }
  int64_t i = 0;
  for (; i + 2 * kPack <= stretch.count; i += 2 * kPack) {
    TwoPacks all = widen_two_for<Row>(sum + i);
    for (int r = 0; r < kRows; ++r) {
      fetch_ahead<kRows>(from[r] + i, 2 * kPack);
      const TwoPacks row = widen_two(from[r] + i);
      for (int h = 0; h < 2; ++h) {
        // The coefficients of bf16 rows are rounded to so many bits that the product is exact.
        all.pack[h] = kIsSplit<Row> ? add_exact_product(factor[r], row.pack[h], all.pack[h])
                                    : all.pack[h] + factor[r] * row.pack[h];
      }
    }
    if constexpr (kIsSplit<Row>) all = joined(all);
    __builtin_memcpy(sum + i, &all, sizeof all);
  }
  for (; i < stretch.count; ++i) {
    for (int r = 0; r < kRows; ++r) sum[i] += coefficients[r] * as_double(from[r][i]);
  }
}

template <class Row>
OPTIM_EXT_INLINE void add_all(void* const* rows, int64_t count, const double* coefficients, const Stretch& stretch,
                              double* sum) {
  in_blocks<8>(count, [&]<int kRows>(int64_t r) __attribute__((always_inline)) {
    add_rows<Row, kRows>(rows + r, coefficients + r, stretch, sum);
  });
}

// Norms of the n elements of `vector`, and their product with `other`.
template <class V>
OPTIM_EXT_INLINE Norms norms_of(const V* vector, const V* other, int64_t n) {
  Lanes largest, sum, product;
  largest.clear();
  sum.clear();
  product.clear();
  const auto add = [&](const V* x, const V* y, int64_t i) {
    for (int p = 0; p < kPacks; ++p) {
      const Doubles value = widen(x + i + p * kPack);
      const Doubles magnitude = value < 0.0 ? -value : value;
      const Doubles larger = magnitude > largest.pack[p] ? magnitude : largest.pack[p];
      largest.pack[p] = magnitude == magnitude ? larger : magnitude;
      sum.pack[p] += magnitude;
      if (y != nullptr) product.pack[p] += value * widen(y + i + p * kPack);
    }
  };
  int64_t i = 0;
  for (; i + kHistoryLanes <= n; i += kHistoryLanes) add(vector, other, i);
  if (i < n) {
    V rest[kUnroll], other_rest[kUnroll];
    const V* const with = other == nullptr ? nullptr : padded(other + i, n - i, other_rest);
    add(padded(vector + i, n - i, rest), with, 0);
  }
  double most = 0.0;
  for (int l = 0; l < kHistoryLanes; ++l) most = rules::larger(most, largest.lane(l));
  return {most, sum.sum(), product.sum()};
}

template <class V, class Row>
OPTIM_EXT_INLINE void combine_tiles(const HistoryCombination& task, int64_t first, int64_t last, Norms* norms) {
  alignas(64) double sum[kStretch * kHistoryTile];
  const History& history = task.history;
  const auto work = [&](const Stretch& stretch, int64_t tile) __attribute__((always_inline)) {
    const V* const grad = static_cast<const V*>(task.grad) + stretch.start;
    V* const d = static_cast<V*>(task.d) + stretch.start;
    const double grad_coefficient = task.grad_coefficient;
    OPTIM_EXT_FOR(i, stretch.count) sum[i] = grad_coefficient * as_double(grad[i]);
    add_all<Row>(history.old_dirs, history.count, task.y_coefficient, stretch, sum);
    if (task.metric != nullptr) {
      const V* const metric = static_cast<const V*>(task.metric) + stretch.start;
      OPTIM_EXT_FOR(i, stretch.count) sum[i] = sum[i] * as_double(metric[i]);
    }
    add_all<Row>(history.old_stps, history.count, task.s_coefficient, stretch, sum);
    OPTIM_EXT_FOR(i, stretch.count) d[i] = static_cast<V>(sum[i]);
    for (int64_t i = 0; i < stretch.count; i += kHistoryTile)
      norms[tile + i / kHistoryTile] = norms_of<V>(d + i, grad + i, stretch.tile_size(i));
  };
  in_stretches<Direction::backwards>(task.numel, first, last, work);
}

}  // namespace

// Tiles [first, last) of a task; results go to their place among those of all tiles.
void history_dots(const HistoryDots& task, int64_t first, int64_t last, double* sums) {
  const bool in_double = task.value == Storage::f64;
  if (task.history.storage == Storage::bf16) {
    in_double ? dot_tiles<double, Bf16>(task, first, last, sums) : dot_tiles<float, Bf16>(task, first, last, sums);
  } else {
    in_double ? dot_tiles<double, double>(task, first, last, sums) : dot_tiles<float, float>(task, first, last, sums);
  }
}

void history_combine(const HistoryCombination& task, int64_t first, int64_t last, Norms* norms) {
  const bool in_double = task.value == Storage::f64;
  if (task.history.storage == Storage::bf16) {
    in_double ? combine_tiles<double, Bf16>(task, first, last, norms)
              : combine_tiles<float, Bf16>(task, first, last, norms);
  } else {
    in_double ? combine_tiles<double, double>(task, first, last, norms)
              : combine_tiles<float, float>(task, first, last, norms);
  }
}

void norms_of_tiles(const NormsOf& task, int64_t first, int64_t last, Norms* norms) {
  const auto work = [&]<class V>(const V* vector, const V* other) __attribute__((always_inline)) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t start = tile * kHistoryTile;
      const int64_t n = task.numel - start < kHistoryTile ? task.numel - start : kHistoryTile;
      norms[tile] = norms_of<V>(vector + start, other == nullptr ? nullptr : other + start, n);
    }
  };
  if (task.value == Storage::f64) {
    work(static_cast<const double*>(task.vector), static_cast<const double*>(task.other));
  } else {
    work(static_cast<const float*>(task.vector), static_cast<const float*>(task.other));
  }
}

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
