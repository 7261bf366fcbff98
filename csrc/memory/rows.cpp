#include "rows.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace optim_ext::memory {

namespace {

using Numbers = std::unique_ptr<int64_t[]>;

Numbers numbers(int64_t count) { return std::make_unique_for_overwrite<int64_t[]>(count); }

// A row and which of the values belongs to it.
struct Place {
  int64_t row, source;
};

constexpr int kLeastDigit = 4, kMostDigit = 11;  // bits a pass looks at: as many as there are places, within reason

// Sorts by row, all of them below `limit`; places in the same row stay in order. `spare` is as long as `places`;
// returns which of the two holds the result.
Place* sort_by_row(Place* places, Place* spare, int64_t count, uint64_t limit) {
  const int bits = std::bit_width(limit - 1);
  const int most = std::clamp<int>(std::bit_width(static_cast<uint64_t>(count)), kLeastDigit, kMostDigit);
  const int passes = std::max(1, (bits + most - 1) / most), digit = (bits + passes - 1) / passes;
  int64_t begins[1 << kMostDigit];
  for (int shift = 0; shift < bits; shift += digit) {
    const int64_t mask = (int64_t{1} << digit) - 1;
    std::fill_n(begins, mask + 1, 0);
    for (int64_t n = 0; n < count; ++n) ++begins[(places[n].row >> shift) & mask];
    int64_t begin = 0;
    for (int64_t value = 0; value <= mask; ++value) begin += std::exchange(begins[value], begin);
    for (int64_t n = 0; n < count; ++n) spare[begins[(places[n].row >> shift) & mask]++] = places[n];
    std::swap(places, spare);
  }
  return places;
}

}  // namespace

std::optional<SparseIndices::Outside> SparseIndices::outside() const {
  for (int64_t d = 0; d < dims && count > 0; ++d) {
    int64_t least = at(d, 0), most = least;
    for (int64_t n = 1; n < count; ++n) {
      least = std::min(least, at(d, n));
      most = std::max(most, at(d, n));
    }
    if (least < 0 || most >= sizes[d]) return Outside{d, least < 0 ? least : most};
  }
  return std::nullopt;
}

SparseRows::SparseRows(const SparseIndices& indices, bool unique) : count(indices.count), rows(indices.data) {
  if (indices.dims != 1 || indices.count_stride != 1) {
    made_rows_ = numbers(count);
    for (int64_t n = 0; n < count; ++n) {
      int64_t row = 0;
      for (int64_t d = 0; d < indices.dims; ++d) row = row * indices.sizes[d] + indices.at(d, n);
      made_rows_[n] = row;
    }
    rows = made_rows_.get();
  }
  bool ascending = true;
  for (int64_t n = 1; n < count && !unique; ++n) ascending &= rows[n - 1] < rows[n];
  if (unique || ascending) return;

  const auto memory = std::make_unique_for_overwrite<Place[]>(2 * count);
  for (int64_t n = 0; n < count; ++n) memory[n] = {rows[n], n};
  uint64_t limit = 1;
  for (int64_t d = 0; d < indices.dims; ++d) limit *= static_cast<uint64_t>(indices.sizes[d]);
  const Place* const sorted = sort_by_row(memory.get(), memory.get() + count, count, limit);

  Numbers distinct = numbers(count);
  made_firsts_ = numbers(count + 1);
  made_sources_ = numbers(count);
  int64_t kept = 0;
  for (int64_t n = 0; n < count; ++n) {
    if (n == 0 || sorted[n].row != sorted[n - 1].row) {
      distinct[kept] = sorted[n].row;
      made_firsts_[kept++] = n;
    }
    made_sources_[n] = sorted[n].source;
  }
  made_firsts_[kept] = count;
  made_rows_ = std::move(distinct);
  count = kept;
  rows = made_rows_.get();
  firsts = made_firsts_.get();
  sources = made_sources_.get();
}

}  // namespace optim_ext::memory
