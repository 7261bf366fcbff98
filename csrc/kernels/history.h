// What L-BFGS does with its history of flat vectors: dot products of all of them with the gradient, and their linear
// combination. Vectors are dense; a history is a list of rows, oldest first, that need not lie side by side.
#pragma once

#include "../rules/lbfgs.h"
#include "operand.h"

namespace optim_ext {

// Every sum runs over the elements of one tile first and then over the tiles in order, both in a fixed order, so that
// the result is the same for any number of threads, instruction set or launch shape.
constexpr int64_t kHistoryTile = 1024;

// A sum over a tile is kept in so many parts, which are added up last: ((0+4)+(2+6))+((1+5)+(3+7)).
constexpr int kHistoryLanes = 8;

inline int64_t history_tiles(int64_t numel) { return (numel + kHistoryTile - 1) / kHistoryTile; }

// Vectors may be parts of longer ones, of which other processes have the rest; then sums are of the first `counted`
// elements, whole tiles, as another process counts what this one has a copy of.

// The history: differences of gradients (old_dirs) and steps (old_stps), in the storage of the rows.
struct History {
  void* const* old_dirs;
  void* const* old_stps;
  int64_t count;
  Storage storage;
};

// The dot products of every row with the gradient and, where `with_difference`, with the last old_dirs row too.
struct HistoryDots {
  History history;
  int64_t numel, counted;
  Storage value;  // of the vectors that are not rows: f32 or f64
  const void* grad;
  const void* metric;  // null, or what the old_dirs rows are multiplied with, element by element, in every product
  bool with_difference;
  // Where `forms_pair`, the last rows are made first, of the gradient and these two. They may be those rows themselves.
  bool forms_pair;
  rules::LbfgsPair pair;
  const void* prev_grad;
  const void* d;

  OPTIM_EXT_HOST_DEVICE int64_t columns() const { return with_difference ? 2 : 1; }
  // Partial sums of a tile: [row][column], first the old_dirs rows, then the old_stps rows.
  OPTIM_EXT_HOST_DEVICE int64_t sums() const { return 2 * history.count * columns(); }
};

// d = metric * (grad_coefficient * grad + sum y_coefficient[i] old_dirs[i]) + sum s_coefficient[i] old_stps[i].
struct HistoryCombination {
  History history;
  int64_t numel, counted;
  Storage value;
  const void* grad;
  const void* metric;
  void* d;
  double grad_coefficient;
  const double* y_coefficient;
  const double* s_coefficient;
};

// The largest magnitude of a vector (NaN if there is one), the sum of magnitudes, and the product with another vector
// (null: zero). Of a combination, the vector is d and the other the gradient.
struct Norms {
  double largest, sum, product;
};

struct NormsOf {
  int64_t numel, counted;
  Storage value;
  const void* vector;
  const void* other;
};

// Partial results, tile after tile, into one.
inline Norms total(const Norms* tiles, int64_t count) {
  Norms all{0.0, 0.0, 0.0};
  for (int64_t i = 0; i < count; ++i) {
    all.largest = rules::larger(all.largest, tiles[i].largest);
    all.sum += tiles[i].sum;
    all.product += tiles[i].product;
  }
  return all;
}

inline void total(const double* tiles, int64_t count, int64_t width, double* sums) {
  for (int64_t j = 0; j < width; ++j) sums[j] = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < width; ++j) sums[j] += tiles[i * width + j];
  }
}

}  // namespace optim_ext
