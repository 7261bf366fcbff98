// What one thread of a reduction does. It compiles as plain C++ too: a test adds up every lane on the host and compares
// the result with the CPU's, bit for bit.
#pragma once

#include "../norm_outcome.h"
#include <utility>

#include "../reduce.h"
#include "kept_words.h"

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
  double count;  // elements of all tensors, for one result

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

// What element `index` of a tensor contributes, where a reduction has several operands; those it does not use are 0.
template <class Reduction, int... K>
OPTIM_EXT_HOST_DEVICE double joint_term(const Block<ReduceJob<Reduction>>& block, int64_t index,
                                        std::integer_sequence<int, K...>) {
  using Job = ReduceJob<Reduction>;
  constexpr int kCount = kSlots<Job>;
  int64_t at[kCount];
  OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) at[s] = block.layout ? 0 : index;
  for (int d = block.layout ? block.layout->ndim - 1 : -1; d >= 0; --d) {
    const int64_t rest = index / block.layout->sizes[d], place = index - rest * block.layout->sizes[d];
    OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) at[s] +=
        block.layout->place(operand_of<Job>(s), d, place) * block.layout->strides[operand_of<Job>(s)][d];
    index = rest;
  }
  double value[kCount];
  OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
    value[s] = load_element<double>(in_global(block.entry.data[s]), block.entry.storage[s], at[s]);
  }
  return Reduction::term((((Job::kUsed >> K) & 1u) ? value[slot_of<Job>(K)] : 0.0)...);
}

// The share of lane `lane` in tile `tile` of an open block.
template <class Reduction>
OPTIM_EXT_HOST_DEVICE double reduce_thread(const Block<ReduceJob<Reduction>>& block, int tile, int lane) {
  const int64_t begin = tile * kReduceTile, left = block.size - begin;
  const int64_t size = left < kReduceTile ? left : kReduceTile;
  const int64_t first = block.begin + begin;
  if constexpr (Reduction::kOperands > 1) {
    return reduce_lane<rules::Combined<Reduction>>(size, lane, [&](int64_t i) {
      return joint_term(block, first + i, std::make_integer_sequence<int, Reduction::kOperands>{});
    });
  } else {
    void* const data = in_global(block.entry.data[0]);
    const Storage storage = block.entry.storage[0];
    const auto lane_of = [&](const auto& element) { return reduce_lane<Reduction>(size, lane, element); };
    if (block.layout) {
      return lane_of(
          [=, &block](int64_t i) { return load_element<double>(data, storage, block.layout->offset(0, first + i)); });
    }
    switch (storage) {
      case Storage::f32: return lane_of([=](int64_t i) { return load_element<double>(data, Storage::f32, first + i); });
      case Storage::f64: return lane_of([=](int64_t i) { return load_element<double>(data, Storage::f64, first + i); });
      case Storage::bf16:
        return lane_of([=](int64_t i) { return load_element<double>(data, Storage::bf16, first + i); });
      default: return lane_of([=](int64_t i) { return load_element<double>(data, Storage::f16, first + i); });
    }
  }
}

// The same for parameters that are kept in something besides themselves: what the two are together. Its tables have
// entries for that, whose positions are elements.
template <class Reduction>
struct KeptReduceBlock : Block<ReduceJob<Reduction>> {
  KeptHead kept;
};

template <class Reduction>
OPTIM_EXT_HOST_DEVICE void open_kept_reduce(const Batch<ReduceJob<Reduction>>& batch, const unsigned char* table,
                                            int64_t index, KeptReduceBlock<Reduction>& block) {
  using Job = ReduceJob<Reduction>;
  const auto* const entry = open_entry<KeptEntry<Job>, Job>(batch, table, index, block);
  if (entry != nullptr) block.kept = entry->kept;
}

template <class Reduction>
OPTIM_EXT_HOST_DEVICE double reduce_kept_thread(const KeptReduceBlock<Reduction>& block, int tile, int lane) {
  const int64_t begin = tile * kReduceTile, left = block.size - begin;
  const int64_t size = left < kReduceTile ? left : kReduceTile;
  const int64_t first = block.begin + begin;
  const Storage storage = block.entry.storage[0];
  const KeptHead kept = block.kept;
  const void* const param = in_global(block.entry.data[0]);
  return reduce_lane<Reduction>(size, lane, [&](int64_t i) {
    const int64_t index = first + i, at = block.layout ? block.layout->offset(0, index) : index;
    if (kept.precision == Precision::native) return load_element<double>(param, storage, at);
    const uint32_t word = load_one(param, bytes_of(storage), at);
    const uint32_t twin = load_one(in_global(kept.twin), width_of_twin(kept.precision), index);
    return double{joined(kept.precision, storage, kept.in_order & 1u ? word : moved(storage, word), twin)};
  });
}

// A reduction of fibers. As the tables of batch.h have it, a tensor is as many elements as there are threads to work
// for it: one for each piece, or kLanes of them; `step` is the divisor.
template <class Reduction>
struct FiberJob : Reduction {
  static constexpr int kOperands = 2;  // the tensor, the results
  static constexpr unsigned kUsed = 3, kUpdates = 2;
  double divisor;

  OPTIM_EXT_HOST_DEVICE FiberJob at_step(double step) const { return {{}, step}; }
};

// How many threads a tensor's fibers are given.
inline int64_t threads_of(const Fibers& fibers) {
  return fibers.outer * fibers.pieces() * fibers.inner * (fibers.by_lanes() ? kLanes : 1);
}

// A tensor for the table; `layout` keeps its sizes.
inline Bundle bundle_of(const Fibers& fibers, Layout& layout) {
  layout.ndim = 3;
  layout.sizes[0] = fibers.outer;
  layout.sizes[1] = fibers.along;
  layout.sizes[2] = fibers.inner;
  Bundle bundle{};
  bundle.data[0] = const_cast<void*>(fibers.data);
  bundle.data[1] = fibers.results;
  bundle.storage[0] = fibers.storage;
  bundle.storage[1] = Storage::f64;
  bundle.numel = threads_of(fibers);
  bundle.layout = &layout;
  bundle.step = fibers.divisor;
  return bundle;
}

template <class Reduction>
OPTIM_EXT_HOST_DEVICE Fibers fibers_of(const Block<FiberJob<Reduction>>& block) {
  const int64_t* const sizes = block.layout->sizes;
  return {in_global(block.entry.data[0]),
          block.entry.storage[0],
          sizes[0],
          sizes[1],
          sizes[2],
          block.rule.divisor,
          static_cast<double*>(in_global(block.entry.data[1]))};
}

// What thread `thread` of a tensor has of its piece; all of it, unless lanes share the piece.
template <class Reduction>
OPTIM_EXT_HOST_DEVICE double reduce_fiber(const Fibers& fibers, int64_t thread) {
  const bool by_lanes = fibers.by_lanes();
  const int64_t number = by_lanes ? thread / kLanes : thread;  // of the piece's result
  const int64_t inner = number % fibers.inner, piece = number / fibers.inner % fibers.pieces(),
                outer = number / fibers.inner / fibers.pieces();
  const int64_t first = (outer * fibers.along + piece * kFiberPiece) * fibers.inner + inner;
  const int64_t size = fibers.size_of(piece);
  const auto element = [&](int64_t a) {
    return load_element<double>(fibers.data, fibers.storage, first + a * fibers.inner);
  };
  if (by_lanes) return reduce_lane<Reduction>(size, static_cast<int>(thread % kLanes), element);
  double result = 0.0;
#if defined(__CUDACC__)
#pragma unroll 8
#endif
  for (int64_t a = 0; a < size; ++a) result = Reduction::combine(result, Reduction::term(element(a)));
  return result;
}

}  // namespace optim_ext::cuda
