// In which order a reduction adds up. The order depends on the tensors' sizes alone, so the result has the same bits
// for any number of threads, any instruction set and any launch, on the CPU and on a GPU.
//
// A tensor is cut into chunks of kReduceChunk elements, a chunk into kReduceSlots tiles; each tile gives one number,
// its slot's (0 where the tensor has ended). In a tile, kLanes running results each take every kLanes-th element and
// are then combined pairwise. The slots are reduced in the same way, tile by tile, and the tiles' results one after the
// other.
#pragma once

#include "../rules/norm.h"
#include "operand.h"

namespace optim_ext {

constexpr int kLanes = 32;
constexpr int64_t kReduceTile = 2048;
constexpr int64_t kReduceSlots = 8;
constexpr int64_t kReduceChunk = kReduceSlots * kReduceTile;

inline int64_t reduce_chunks(int64_t numel) { return (numel + kReduceChunk - 1) / kReduceChunk; }

// A tile's result on the CPU; element(i) is its i-th element as a double. (A GPU gives each lane to a thread.)
template <class Rule, class Element>
inline __attribute__((always_inline)) double reduce_tile(int64_t size, const Element& element) {
  double lane[kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] = Rule::combine(lane[l], Rule::term(element(i + l)));
  }
  for (int64_t i = whole; i < size; ++i) lane[i - whole] = Rule::combine(lane[i - whole], Rule::term(element(i)));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] = Rule::combine(lane[l], lane[l + width]);
  }
  return lane[0];
}

// What many slots come to, on the CPU.
template <class Rule>
double reduce_slots(const double* slots, int64_t count) {
  double result = 0.0;
  for (int64_t start = 0; start < count; start += kReduceTile) {
    const int64_t left = count - start;
    const double tile = reduce_tile<rules::Combined<Rule>>(left < kReduceTile ? left : kReduceTile,
                                                           [=](int64_t i) { return slots[start + i]; });
    result = Rule::combine(result, tile);
  }
  return result;
}

}  // namespace optim_ext
