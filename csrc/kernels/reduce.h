// In which order a reduction adds up. The order depends on the tensors' sizes alone, so the result has the same bits
// for any number of threads, any instruction set and any launch, on the CPU and on a GPU.
//
// A tensor is cut into chunks of kReduceChunk elements, a chunk into kReduceSlots tiles; each tile gives one number,
// its slot's (0 where the tensor has ended). In a tile, kLanes running results each take every kLanes-th element and
// are then combined pairwise. The slots are reduced in the same way, tile by tile, and the tiles' results one after the
// other.
//
// A reduction along one dimension adds up fibers: the elements that differ in their index along it only. A fiber is cut
// into pieces of kFiberPiece elements, and what the pieces come to is reduced like a fiber, until there is one piece.
// In a piece, elements that lie side by side are given to kLanes results as in a tile, if there are as many; others are
// taken one after the other.
#pragma once

#include "../rules/norm.h"
#include "operand.h"

namespace optim_ext {

constexpr int kLanes = 32;
constexpr int64_t kReduceTile = 2048;
constexpr int64_t kReduceSlots = 8;
constexpr int64_t kReduceChunk = kReduceSlots * kReduceTile;

inline int64_t reduce_chunks(int64_t numel) { return (numel + kReduceChunk - 1) / kReduceChunk; }

// Gives `size` more elements of a tile, whose first is a multiple of kLanes, to its lanes; element(i) is the i-th of
// them as a double.
template <class Rule, class Element>
inline __attribute__((always_inline)) void reduce_into(double* lane, int64_t size, const Element& element) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] = Rule::combine(lane[l], Rule::term(element(i + l)));
  }
  for (int64_t i = whole; i < size; ++i) lane[i - whole] = Rule::combine(lane[i - whole], Rule::term(element(i)));
}

template <class Rule>
inline __attribute__((always_inline)) double combine_lanes(double* lane) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] = Rule::combine(lane[l], lane[l + width]);
  }
  return lane[0];
}

// A tile's result on the CPU. (A GPU gives each lane to a thread.)
template <class Rule, class Element>
inline __attribute__((always_inline)) double reduce_tile(int64_t size, const Element& element) {
  double lane[kLanes] = {};
  reduce_into<Rule>(lane, size, element);
  return combine_lanes<Rule>(lane);
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

constexpr int64_t kFiberPiece = 256;
constexpr int64_t kFiberWidth = 1024;  // fibers side by side that the CPU takes together

// A dense tensor, element (o, a, i) being number (o * along + a) * inner + i of its memory, to be reduced along a.
struct Fibers {
  const void* data;
  Storage storage;
  int64_t outer, along, inner;
  double divisor;   // of the results
  double* results;  // of piece p of fiber (o, i): number (o * pieces() + p) * inner + i

  OPTIM_EXT_HOST_DEVICE int64_t pieces() const { return (along + kFiberPiece - 1) / kFiberPiece; }
  OPTIM_EXT_HOST_DEVICE int64_t size_of(int64_t piece) const {
    const int64_t left = along - piece * kFiberPiece;
    return left < kFiberPiece ? left : kFiberPiece;
  }
  OPTIM_EXT_HOST_DEVICE bool by_lanes() const { return inner == 1 && along >= kLanes; }
  // The CPU's unit of work: a piece of up to kFiberWidth fibers.
  int64_t widths() const { return (inner + kFiberWidth - 1) / kFiberWidth; }
  int64_t units() const { return outer * pieces() * widths(); }
};

}  // namespace optim_ext
