// Tiles of operands that are not taken where they are: opened and closed. Compiled once per instruction set inside the
// namespace OPTIM_EXT_ISA, by tile_moves.cpp alone: this is most of the code of a sweep, and the same for every rule.
#include "convert-inl.h"
#include "tiles-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// Visits n elements from `start` in blocks of whole runs, and parts of a run at either end. Only the first place is
// found by division.
template <class V, class Visit>
OPTIM_EXT_INLINE void walk(const TileOperand<V>& of, const Start& start, int64_t n, const Visit& visit) {
  const Layout* const layout = of.layout;
  const int last = layout->ndim - 1;
  int64_t place[kMaxDims], offset = layout->offset_at(of.operand, start.places);
  for (int d = 0; d <= last; ++d) place[d] = start.places[d];
  const int64_t length = layout->sizes[last], stride = layout->strides[of.operand][last];
  // Runs that lie anywhere are visited one by one.
  const bool even = last > 0 && (last > 1 || (layout->rows == nullptr && layout->outer == nullptr));
  const int64_t most = even ? layout->sizes[last - 1] : 1;
  const int64_t run_stride = even ? layout->strides[of.operand][last - 1] : 0;
  for (int64_t i = 0; i < n;) {
    Block block{1, n - i < length - place[last] ? n - i : length - place[last], run_stride, stride};
    if (place[last] == 0 && n - i >= length) {
      const int64_t left = even ? most - place[last - 1] : 1, whole = (n - i) / length;
      block.runs = left < whole ? left : whole;
    }
    visit(i, offset, block);
    i += block.runs * block.length;
    offset = layout->skip_runs(of.operand, offset - place[last] * stride, place, block.runs);
    place[last] = 0;
  }
}

// Rows of a sparse gradient that lie anywhere in memory, or in several places.
template <class V>
OPTIM_EXT_INLINE void load_sums(const TileOperand<V>& of, int64_t start, int64_t n, V* buffer) {
  const Layout* const layout = of.layout;
  V term[kTile];
  const int64_t width = layout->sizes[1];
  int64_t row = start / width, column = start - row * width;
  for (int64_t i = 0, count; i < n; i += count, ++row, column = 0) {
    count = width - column < n - i ? width - column : n - i;
    int64_t source = layout->firsts[row];
    widen(of.at(layout->sources[source] * width + column), of.storage, {1, count, 1, 1}, buffer + i);
    while (++source < layout->firsts[row + 1]) {
      widen(of.at(layout->sources[source] * width + column), of.storage, {1, count, 1, 1}, term);
      V* const sum = buffer + i;
      OPTIM_EXT_FOR(e, count) sum[e] = sum[e] + term[e];
    }
  }
}

}  // namespace

template <class V>
void TileOperand<V>::load(const Start& start, int64_t n, V* buffer) const {
  if (layout == nullptr) return widen(at(start.index), storage, {1, n, 1, 1}, buffer);
  if (layout->firsts != nullptr && operand == kGradOperand) return load_sums(*this, start.index, n, buffer);
  walk(*this, start, n, [&](int64_t i, int64_t offset, const Block& block) __attribute__((always_inline)) {
    widen(at(offset), storage, block, buffer + i);
  });
}

template <class V>
void TileOperand<V>::store(const Start& start, int64_t n, const V* buffer) const {
  if (layout == nullptr) return narrow(buffer, at(start.index), storage, {1, n, 1, 1});
  walk(*this, start, n, [&](int64_t i, int64_t offset, const Block& block) __attribute__((always_inline)) {
    narrow(buffer + i, at(offset), storage, block);
  });
}

template struct TileOperand<float>;
template struct TileOperand<double>;

// For units that are not linked with this one.
template <class V>
void load(const void* of, const void* start, int64_t n, void* buffer) {
  static_cast<const TileOperand<V>*>(of)->load(*static_cast<const Start*>(start), n, static_cast<V*>(buffer));
}

template <class V>
void store(const void* of, const void* start, int64_t n, const void* buffer) {
  static_cast<const TileOperand<V>*>(of)->store(*static_cast<const Start*>(start), n, static_cast<const V*>(buffer));
}

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
