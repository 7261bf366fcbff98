// What one thread of a reduction does. It compiles as plain C++ too: a test adds up every lane on the host and compares
// the result with the CPU's, bit for bit.
#pragma once

#include "../norm_outcome.h"
#include "../reduce.h"
#include "block.h"

namespace optim_ext::cuda {

static_assert(kThreads == kLanes * kReduceSlots, "a block is one chunk, a warp one tile, a thread one lane");

// The reduction as the tables of batch.h take it, with what its blocks share.
template <class Reduction>
struct ReduceJob : Reduction {
  double* slots;  // of the first chunk of this launch's table
  // For one result of all launches, which the last block of the last one writes:
  unsigned* finished;  // blocks that are done; null: one result per tensor is wanted
  unsigned blocks;     // of all launches
  const double* all_slots;
  NormOutcome outcome;
  // For one result per tensor of the table:
  double* each;
  int32_t chunks;

  OPTIM_EXT_HOST_DEVICE ReduceJob at_step(double) const { return *this; }
};

// What one lane of a tile adds up; reduce_tile() of reduce.h does the same for all lanes in one thread.
template <class Rule, class Element>
OPTIM_EXT_HOST_DEVICE double reduce_lane(int64_t size, int lane, const Element& element) {
  double result = 0.0;
#if defined(__CUDACC__)
#pragma unroll 8
#endif
  for (int64_t i = lane; i < size; i += kLanes) result = Rule::combine(result, Rule::term(element(i)));
  return result;
}

// The share of lane `lane` in tile `tile` of an open block.
template <class Reduction>
OPTIM_EXT_HOST_DEVICE double reduce_thread(const Block<ReduceJob<Reduction>>& block, int tile, int lane) {
  const int64_t begin = tile * kReduceTile, left = block.size - begin;
  const int64_t size = left < kReduceTile ? left : kReduceTile;
  const int64_t first = block.begin + begin;
  void* const data = in_global(block.entry.data[0]);
  const Storage storage = block.entry.storage[0];
  if (block.layout) {
    return reduce_lane<Reduction>(
        size, lane, [=](int64_t i) { return load_element<double>(data, storage, block.layout->offset(0, first + i)); });
  }
  switch (storage) {
    case Storage::f32:
      return reduce_lane<Reduction>(size, lane,
                                    [=](int64_t i) { return load_element<double>(data, Storage::f32, first + i); });
    case Storage::f64:
      return reduce_lane<Reduction>(size, lane,
                                    [=](int64_t i) { return load_element<double>(data, Storage::f64, first + i); });
    case Storage::bf16:
      return reduce_lane<Reduction>(size, lane,
                                    [=](int64_t i) { return load_element<double>(data, Storage::bf16, first + i); });
    default:
      return reduce_lane<Reduction>(size, lane,
                                    [=](int64_t i) { return load_element<double>(data, Storage::f16, first + i); });
  }
}

}  // namespace optim_ext::cuda
