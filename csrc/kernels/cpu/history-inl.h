// The loops of L-BFGS over tiles of its history, compiled once per instruction set as sweep-inl.h is. Sums are written
// with vectors of a fixed number of lanes, as a compiler may not reorder them itself: the registers of each instruction
// set hold them in one, two or four pieces, which changes nothing in the order of additions.

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

constexpr int kLanes = 8;
constexpr int kPack = OPTIM_EXT_REGISTER_BYTES / 8;  // lanes in one register
constexpr int kPacks = kLanes / kPack;

typedef double Doubles __attribute__((vector_size(8 * kPack)));
typedef float Floats __attribute__((vector_size(4 * kPack)));
typedef uint32_t Words __attribute__((vector_size(4 * kPack)));
typedef uint16_t Halves __attribute__((vector_size(2 * kPack)));

template <class Vector>
OPTIM_EXT_INLINE Vector read(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

// Rows stored as bf16; the other two storages are C++ types.
struct Bf16 {
  uint16_t bits;
};

OPTIM_EXT_INLINE Doubles widen(const double* from) { return read<Doubles>(from); }
OPTIM_EXT_INLINE Doubles widen(const float* from) { return __builtin_convertvector(read<Floats>(from), Doubles); }
OPTIM_EXT_INLINE Doubles widen(const Bf16* from) {
  const Words bits = __builtin_convertvector(read<Halves>(from), Words) << 16;
  return __builtin_convertvector(__builtin_bit_cast(Floats, bits), Doubles);
}

OPTIM_EXT_INLINE double as_double(double value) { return value; }
OPTIM_EXT_INLINE double as_double(float value) { return value; }
OPTIM_EXT_INLINE double as_double(Bf16 value) { return widen_bf16(value.bits); }

template <class T>
OPTIM_EXT_INLINE void store(T* to, double value) {
  *to = static_cast<T>(value);
}
OPTIM_EXT_INLINE void store(Bf16* to, double value) { to->bits = narrow_bf16(static_cast<float>(value)); }

OPTIM_EXT_INLINE Doubles all_lanes(double value) { return value - Doubles{}; }

struct Lanes {
  Doubles pack[kPacks];

  OPTIM_EXT_INLINE void clear() {
    for (int p = 0; p < kPacks; ++p) pack[p] = Doubles{};
  }
  OPTIM_EXT_INLINE double lane(int i) const { return pack[i / kPack][i % kPack]; }
  OPTIM_EXT_INLINE double sum() const {
    return ((lane(0) + lane(4)) + (lane(2) + lane(6))) + ((lane(1) + lane(5)) + (lane(3) + lane(7)));
  }
};

// Elements of a tile that do not fill the lanes, in a buffer that does, padded with zeros.
template <class T>
OPTIM_EXT_INLINE const T* padded(const T* from, int64_t n, T* buffer) {
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < n ? from[i] : T{};
  return buffer;
}

// Bytes of a row that a prefetch brings in.
constexpr int64_t kLine = 64;

// Dot products of kRows rows with kColumns vectors of n elements. While they are read, the rows needed next are
// fetched: a tile is too short for the hardware to notice the stream.
template <class Row, int kRows, int kColumns>
OPTIM_EXT_INLINE void dot_rows(const Row* const* rows, const Row* const* next, const double* const* vectors, int64_t n,
                               double* sums) {
  Lanes lanes[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) lanes[r][c].clear();
  }
  const auto add = [&](const Row* const* from, const double* const* with, int64_t i) {
    for (int p = 0; p < kPacks; ++p) {
      Doubles vector[kColumns];
      for (int c = 0; c < kColumns; ++c) vector[c] = read<Doubles>(with[c] + i + p * kPack);
      for (int r = 0; r < kRows; ++r) {
        const Doubles row = widen(from[r] + i + p * kPack);
        for (int c = 0; c < kColumns; ++c) lanes[r][c].pack[p] += row * vector[c];
      }
    }
  };
  constexpr int64_t kStep = kLine / static_cast<int64_t>(sizeof(Row));
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + i);
    for (int64_t j = 0; j < kStep; j += kLanes) add(rows, vectors, i + j);
  }
  for (; i + kLanes <= n; i += kLanes) add(rows, vectors, i);
  if (i < n) {
    Row row_rest[kRows][kLanes];
    double vector_rest[kColumns][kLanes];
    const Row* rest[kRows];
    const double* with[kColumns];
    for (int r = 0; r < kRows; ++r) rest[r] = padded(rows[r] + i, n - i, row_rest[r]);
    for (int c = 0; c < kColumns; ++c) with[c] = padded(vectors[c] + i, n - i, vector_rest[c]);
    add(rest, with, 0);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sums[r * kColumns + c] = lanes[r][c].sum();
  }
}

// Rows at a time: as many as there are registers for their sums.
template <int kColumns>
constexpr int kRowBlock = (OPTIM_EXT_REGISTER_BYTES == 64 ? 8 : 4) / kPacks / kColumns > 0
                              ? (OPTIM_EXT_REGISTER_BYTES == 64 ? 8 : 4) / kPacks / kColumns
                              : 1;

template <class Row, int kColumns>
OPTIM_EXT_INLINE void dot_all(void* const* rows, int64_t count, int64_t start, int64_t n, const double* const* vectors,
                              double* sums) {
  constexpr int kBlock = kRowBlock<kColumns>;
  const auto at = [&](int64_t r) { return static_cast<const Row*>(rows[r < count ? r : 0]) + start; };
  int64_t r = 0;
  for (; r + kBlock <= count; r += kBlock) {
    const Row *block[kBlock], *next[kBlock];
    for (int k = 0; k < kBlock; ++k) {
      block[k] = at(r + k);
      next[k] = r + kBlock + k < count ? at(r + kBlock + k) : at(r + kBlock + k - count) + n;
    }
    dot_rows<Row, kBlock, kColumns>(block, next, vectors, n, sums + r * kColumns);
  }
  for (; r < count; ++r) {
    const Row *row = at(r), *next = at(r + 1);
    dot_rows<Row, 1, kColumns>(&row, &next, vectors, n, sums + r * kColumns);
  }
}

template <class V, class Row>
OPTIM_EXT_INLINE void form_pair(const HistoryDots& task, int64_t start, int64_t n) {
  const rules::LbfgsPair pair = task.pair;
  const V* const grad = static_cast<const V*>(task.grad) + start;
  const V* const prev_grad = static_cast<const V*>(task.prev_grad) + start;
  const V* const d = static_cast<const V*>(task.d) + start;
  Row* const y = static_cast<Row*>(task.history.old_dirs[task.history.count - 1]) + start;
  Row* const s = static_cast<Row*>(task.history.old_stps[task.history.count - 1]) + start;
  OPTIM_EXT_FOR(i, n) {
    V to_y = prev_grad[i], to_s = d[i];
    pair(grad[i], to_y, to_s);
    store(&y[i], to_y);
    store(&s[i], to_s);
  }
}

// vectors[c][i] as doubles; for the old_dirs rows multiplied with the metric.
template <class V, class Row, int kColumns>
OPTIM_EXT_INLINE void dot_tile(const HistoryDots& task, int64_t start, int64_t n, double* sums) {
  alignas(64) double plain[kColumns][kHistoryTile], weighted[kColumns][kHistoryTile];
  const History& history = task.history;
  if (task.forms_pair) form_pair<V, Row>(task, start, n);
  const V* const grad = static_cast<const V*>(task.grad) + start;
  OPTIM_EXT_FOR(i, n) plain[0][i] = as_double(grad[i]);
  if constexpr (kColumns == 2) {
    const Row* const difference = static_cast<const Row*>(history.old_dirs[history.count - 1]) + start;
    OPTIM_EXT_FOR(i, n) plain[1][i] = as_double(difference[i]);
  }
  const double *on_stps[kColumns], *on_dirs[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    on_stps[c] = on_dirs[c] = plain[c];
    if (task.metric == nullptr) continue;
    const V* const metric = static_cast<const V*>(task.metric) + start;
    OPTIM_EXT_FOR(i, n) weighted[c][i] = plain[c][i] * as_double(metric[i]);
    on_dirs[c] = weighted[c];
  }
  dot_all<Row, kColumns>(history.old_dirs, history.count, start, n, on_dirs, sums);
  dot_all<Row, kColumns>(history.old_stps, history.count, start, n, on_stps, sums + history.count * kColumns);
}

template <class V, class Row>
OPTIM_EXT_INLINE void dot_tiles(const HistoryDots& task, int64_t first, int64_t last, double* sums) {
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t start = tile * kHistoryTile;
    const int64_t n = task.numel - start < kHistoryTile ? task.numel - start : kHistoryTile;
    if (task.with_difference) {
      dot_tile<V, Row, 2>(task, start, n, sums + tile * task.sums());
    } else {
      dot_tile<V, Row, 1>(task, start, n, sums + tile * task.sums());
    }
  }
}

// Adds kRows rows, each times its coefficient, to a tile.
template <class Row, int kRows>
OPTIM_EXT_INLINE void add_rows(const Row* const* rows, const Row* const* next, const double* coefficients, int64_t n,
                               double* sum) {
  Doubles factor[kRows];
  for (int r = 0; r < kRows; ++r) factor[r] = all_lanes(coefficients[r]);
  constexpr int64_t kStep = kLine / static_cast<int64_t>(sizeof(Row));
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + i);
    for (int64_t j = 0; j < kStep; j += kPack) {
      Doubles all = read<Doubles>(sum + i + j);
      for (int r = 0; r < kRows; ++r) all += factor[r] * widen(rows[r] + i + j);
      __builtin_memcpy(sum + i + j, &all, sizeof all);
    }
  }
  for (; i < n; ++i) {
    for (int r = 0; r < kRows; ++r) sum[i] += coefficients[r] * as_double(rows[r][i]);
  }
}

template <class Row>
OPTIM_EXT_INLINE void add_all(void* const* rows, int64_t count, const double* coefficients, int64_t start, int64_t n,
                              double* sum) {
  constexpr int kBlock = 8;
  const auto at = [&](int64_t r) { return static_cast<const Row*>(rows[r < count ? r : 0]) + start; };
  int64_t r = 0;
  for (; r + kBlock <= count; r += kBlock) {
    const Row *block[kBlock], *next[kBlock];
    for (int k = 0; k < kBlock; ++k) {
      block[k] = at(r + k);
      next[k] = r + kBlock + k < count ? at(r + kBlock + k) : at(r + kBlock + k - count) + n;
    }
    add_rows<Row, kBlock>(block, next, coefficients + r, n, sum);
  }
  for (; r < count; ++r) {
    const Row *row = at(r), *next = at(r + 1);
    add_rows<Row, 1>(&row, &next, coefficients + r, n, sum);
  }
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
  for (; i + kLanes <= n; i += kLanes) add(vector, other, i);
  if (i < n) {
    V rest[kLanes], other_rest[kLanes];
    const V* const with = other == nullptr ? nullptr : padded(other + i, n - i, other_rest);
    add(padded(vector + i, n - i, rest), with, 0);
  }
  double most = 0.0;
  for (int l = 0; l < kLanes; ++l) most = rules::larger(most, largest.lane(l));
  return {most, sum.sum(), product.sum()};
}

template <class V, class Row>
OPTIM_EXT_INLINE void combine_tiles(const HistoryCombination& task, int64_t first, int64_t last, Norms* norms) {
  alignas(64) double sum[kHistoryTile];
  const History& history = task.history;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t start = tile * kHistoryTile;
    const int64_t n = task.numel - start < kHistoryTile ? task.numel - start : kHistoryTile;
    const V* const grad = static_cast<const V*>(task.grad) + start;
    V* const d = static_cast<V*>(task.d) + start;
    const double grad_coefficient = task.grad_coefficient;
    OPTIM_EXT_FOR(i, n) sum[i] = grad_coefficient * as_double(grad[i]);
    add_all<Row>(history.old_dirs, history.count, task.y_coefficient, start, n, sum);
    if (task.metric != nullptr) {
      const V* const metric = static_cast<const V*>(task.metric) + start;
      OPTIM_EXT_FOR(i, n) sum[i] = sum[i] * as_double(metric[i]);
    }
    add_all<Row>(history.old_stps, history.count, task.s_coefficient, start, n, sum);
    OPTIM_EXT_FOR(i, n) d[i] = static_cast<V>(sum[i]);
    norms[tile] = norms_of<V>(d, grad, n);
  }
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
