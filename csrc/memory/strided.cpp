#include "strided.h"

#include <algorithm>

namespace optim_ext::memory {

namespace {

constexpr int64_t kShortRun = 16, kLongRun = 256;  // elements of the innermost loop
constexpr int64_t kSmallSide = 8, kSide = 16,
                  kLongSide = 64;  // of the squares of two arrays that lie across each other

bool is_used(const Walk& walk, int k) { return (walk.used >> k) & 1u; }

bool repeats_elements(const Walk& walk) {
  bool repeats = false;
  for (const WalkDim& dim : walk.dims) {
    for (int k = 0; k < kMostArrays; ++k) repeats |= is_used(walk, k) && dim.strides[k] == 0;
  }
  return repeats;
}

// The dimension other than the fastest along which an array that is not dense in the fastest is; -1: none.
int across(const Walk& walk) {
  for (int k = 0; k < kMostArrays; ++k) {
    if (!is_used(walk, k) || walk.dims.back().strides[k] == 1) continue;
    for (size_t d = 0; d + 1 < walk.dims.size(); ++d) {
      if (walk.dims[d].strides[k] == 1 && walk.dims[d].size >= kSmallSide) return static_cast<int>(d);
    }
  }
  return -1;
}

// Leaves blocks of about `side` neighbours out of a dimension and returns them; all of it where it has no such factor.
WalkDim split(WalkDim& dim, int64_t side) {
  WalkDim block = dim;
  for (block.size = side; block.size >= kSmallSide && dim.size % block.size != 0;) --block.size;
  if (block.size < kSmallSide) block.size = dim.size;
  dim.size /= block.size;
  for (int64_t& stride : dim.strides) stride *= block.size;
  return block;
}

bool lie_alike(const Walk& walk, int a, int b) {
  return std::all_of(walk.dims.begin(), walk.dims.end(),
                     [&](const WalkDim& dim) { return dim.size == 1 || dim.strides[a] == dim.strides[b]; });
}

int count_alike(const Walk& walk, int array) {
  int count = 0;
  for (int k = 0; k < kMostArrays; ++k) count += is_used(walk, k) && lie_alike(walk, array, k);
  return count;
}

}  // namespace

int most_common(const Walk& walk, int leader) {
  int found = leader;
  for (int k = 0; k < kMostArrays; ++k) {
    if (is_used(walk, k) && count_alike(walk, k) > count_alike(walk, found)) found = k;
  }
  return found;
}

void order(Walk& walk, int leader) {
  std::stable_sort(walk.dims.begin(), walk.dims.end(),
                   [&](const WalkDim& a, const WalkDim& b) { return a.strides[leader] > b.strides[leader]; });
}

void merge(Walk& walk) {
  std::vector<WalkDim> merged;
  for (const WalkDim& dim : walk.dims) {
    if (dim.size == 1) continue;
    bool joins = !merged.empty();
    for (int k = 0; joins && k < kMostArrays; ++k) {
      if (is_used(walk, k)) joins = merged.back().strides[k] == dim.strides[k] * dim.size;
    }
    if (joins) {
      merged.back().size *= dim.size;
      merged.back().strides = dim.strides;
    } else {
      merged.push_back(dim);
    }
  }
  walk.dims = std::move(merged);
}

void lengthen_runs(Walk& walk) {
  std::vector<WalkDim>& dims = walk.dims;
  if (dims.size() < 2 || dims.back().size >= kShortRun || !repeats_elements(walk)) return;
  WalkDim neighbours = dims.front();
  neighbours.size = std::min(neighbours.size, kLongRun);
  while (dims.front().size % neighbours.size != 0) --neighbours.size;
  if (neighbours.size <= dims.back().size) return;
  dims.front().size /= neighbours.size;
  for (int64_t& stride : dims.front().strides) stride *= neighbours.size;
  dims.push_back(neighbours);
}

void make_squares(Walk& walk) {
  if (walk.dims.size() < 2) return;
  const int other = across(walk);
  if (other < 0) return;
  WalkDim &row = walk.dims.back(), &column = walk.dims[static_cast<size_t>(other)];
  if (std::min(row.size, column.size) <= kLongSide) return;  // whose lines stay in the cache until they are used up
  const WalkDim run = split(row, kSide), runs = split(column, kSide);
  walk.dims.push_back(runs);
  walk.dims.push_back(run);
  std::erase_if(walk.dims, [](const WalkDim& dim) { return dim.size == 1; });
}

std::vector<int64_t> list_outer(Walk& walk, size_t most) {
  if (walk.dims.size() <= most) return {};
  const auto inner = walk.dims.end() - static_cast<int64_t>(most - 1);
  int64_t count = 1, of_inner = 1;  // elements
  for (auto dim = walk.dims.begin(); dim != inner; ++dim) count *= dim->size;
  for (auto dim = inner; dim != walk.dims.end(); ++dim) of_inner *= dim->size;
  std::vector<int64_t> places;
  places.reserve(static_cast<size_t>(count * kMostArrays));
  for (int k = 0; k < kMostArrays; ++k) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, place = 0;
      for (auto dim = inner; dim != walk.dims.begin();) {
        --dim;
        place += rest % dim->size * dim->strides[k];
        rest /= dim->size;
      }
      places.push_back(is_used(walk, k) ? place : i * of_inner);
    }
  }
  WalkDim outer{count, {}};
  outer.strides.fill(1);
  walk.dims.erase(walk.dims.begin(), inner);
  walk.dims.insert(walk.dims.begin(), outer);
  return places;
}

}  // namespace optim_ext::memory
