// The rows of a table that a sparse gradient on the CPU holds.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

namespace optim_ext::memory {

// The indices of a sparse gradient: for each of `count` values a place in each of `dims` dimensions.
struct SparseIndices {
  const int64_t* data;
  int64_t dim_stride, count_stride;
  int64_t dims, count;
  const int64_t* sizes;  // of the dimensions

  int64_t at(int64_t d, int64_t n) const { return data[d * dim_stride + n * count_stride]; }

  struct Outside {
    int64_t dim, index;
  };
  // An index that does not lie in its dimension, if there is one.
  std::optional<Outside> outside() const;
};

// The rows that checked indices name, each once.
struct SparseRows {
  // unique: no row is there twice, so that each is found where its index is.
  SparseRows(const SparseIndices& indices, bool unique);

  int64_t count = 0;
  const int64_t* rows = nullptr;
  // The values that add up to row n of the gradient are rows sources[firsts[n]] to sources[firsts[n + 1] - 1], in the
  // order they came in. Null where row n of the values is row n of the gradient.
  const int64_t* firsts = nullptr;
  const int64_t* sources = nullptr;

 private:
  using Numbers = std::unique_ptr<int64_t[]>;
  Numbers made_rows_, made_firsts_, made_sources_;
};

}  // namespace optim_ext::memory
