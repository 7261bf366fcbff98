// Reductions on a GPU: one launch fills the slots of all tensors, and its last block turns them into the outcome.
#include <cuda_runtime.h>

#include "../../rules/all_rules.h"
#include "launch.h"
#include "reduce_block.h"

namespace optim_ext::cuda {

namespace {

constexpr int kWarps = kThreads / kLanes;

// Lane 0 gets the lanes of its warp combined pairwise, in reduce_tile()'s order.
template <class Rule>
__device__ double combine_lanes(double value) {
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
    value = Rule::combine(value, __shfl_down_sync(0xffffffffu, value, width));
  }
  return value;
}

// Thread 0 of the block gets `count` slots combined, tile by tile. They were written by other blocks, so they are read
// past the L1 cache.
template <class Rule>
__device__ double combine_slots(const double* slots, int64_t count) {
  __shared__ double of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  double result = 0.0;
  for (int64_t round = 0; round < count; round += kWarps * kReduceTile) {
    const double* const tile = slots + round + warp * kReduceTile;
    const int64_t left = count - round - warp * kReduceTile;
    const double sum = combine_lanes<Rule>(reduce_lane<rules::Combined<Rule>>(
        left < kReduceTile ? left : kReduceTile, lane, [=](int64_t i) { return __ldcg(tile + i); }));
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 0; w < kWarps; ++w) result = Rule::combine(result, of_warp[w]);
    }
    __syncthreads();
  }
  return result;
}

template <class Reduction, int64_t kBytes>
__global__ void __launch_bounds__(kThreads) reduce(const __grid_constant__ Args<ReduceJob<Reduction>, kBytes> args) {
  __shared__ Block<ReduceJob<Reduction>> block;
  __shared__ bool is_last;
  if (threadIdx.x == 0) open_block(args.batch, args.batch.remote ? args.batch.remote : args.room, blockIdx.x, block);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const double sum = combine_lanes<Reduction>(reduce_thread(block, warp, lane));
  const ReduceJob<Reduction>& job = block.rule;
  if (lane == 0) {
    job.slots[blockIdx.x * kReduceSlots + warp] = sum;
    __threadfence();
  }
  if (!job.finished) return;
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(job.finished, 1u) == job.blocks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const double total = combine_slots<Reduction>(job.all_slots, static_cast<int64_t>(job.blocks) * kReduceSlots);
  if (threadIdx.x == 0) job.outcome.write(Reduction::finish(total, job.count));
}

// One block per tensor of a table whose slots are filled.
template <class Reduction, int64_t kBytes>
__global__ void __launch_bounds__(kThreads)
    finish_each(const __grid_constant__ Args<ReduceJob<Reduction>, kBytes> args) {
  const ReduceJob<Reduction>& job = args.batch.rule;
  const unsigned char* const table = args.batch.remote ? args.batch.remote : args.room;
  const int32_t* const first_chunk = reinterpret_cast<const int32_t*>(table);
  const int32_t tensor = static_cast<int32_t>(blockIdx.x);
  const int32_t begin = first_chunk[tensor], end = tensor + 1 < args.batch.count ? first_chunk[tensor + 1] : job.chunks;
  const double result = combine_slots<Reduction>(job.slots + begin * kReduceSlots, (end - begin) * kReduceSlots);
  const auto count = static_cast<double>(entries_of(args.batch, table)[tensor].numel);
  if (threadIdx.x == 0) job.each[tensor] = Reduction::finish(result, count);
}

template <class Reduction, int64_t kBytes>
__global__ void __launch_bounds__(kThreads)
    reduce_fibers(const __grid_constant__ Args<FiberJob<Reduction>, kBytes> args) {
  __shared__ Block<FiberJob<Reduction>> block;
  if (threadIdx.x == 0) open_block(args.batch, args.batch.remote ? args.batch.remote : args.room, blockIdx.x, block);
  __syncthreads();
  const Fibers fibers = fibers_of(block);
  // Chunks are multiples of a warp, and so are tensors whose pieces are shared by lanes: a warp is there as a whole.
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.size; i += kThreads) {
    const int64_t thread = block.begin + i;
    const double result = reduce_fiber<Reduction>(fibers, thread);
    if (!fibers.by_lanes()) {
      fibers.results[thread] = result / fibers.divisor;
    } else {
      const double piece = combine_lanes<Reduction>(result);
      if (thread % kLanes == 0) fibers.results[thread / kLanes] = piece / fibers.divisor;
    }
  }
}

}  // namespace

template <class Reduction, int64_t kBytes>
cudaError_t launch_reduce(const Args<ReduceJob<Reduction>, kBytes>& args, int64_t chunks, cudaStream_t stream) {
  return launch_blocks(&reduce<Reduction, kBytes>, args, chunks, stream);
}

template <class Reduction, int64_t kBytes>
cudaError_t launch_finish_each(const Args<ReduceJob<Reduction>, kBytes>& args, cudaStream_t stream) {
  return launch_blocks(&finish_each<Reduction, kBytes>, args, args.batch.count, stream);
}

template <class Reduction, int64_t kBytes>
cudaError_t launch_fibers(const Args<FiberJob<Reduction>, kBytes>& args, int64_t chunks, cudaStream_t stream) {
  return launch_blocks(&reduce_fibers<Reduction, kBytes>, args, chunks, stream);
}

#define OPTIM_EXT_INSTANTIATE(...)                                                                        \
  template cudaError_t launch_reduce(const Args<ReduceJob<rules::__VA_ARGS__>, kArgumentBytes>&, int64_t, \
                                     cudaStream_t);                                                       \
  template cudaError_t launch_finish_each(const Args<ReduceJob<rules::__VA_ARGS__>, kArgumentBytes>&, cudaStream_t);
OPTIM_EXT_FOR_EACH_REDUCTION(OPTIM_EXT_INSTANTIATE)
#undef OPTIM_EXT_INSTANTIATE
#define OPTIM_EXT_INSTANTIATE(...) \
  template cudaError_t launch_fibers(const Args<FiberJob<rules::__VA_ARGS__>, kArgumentBytes>&, int64_t, cudaStream_t);
OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(OPTIM_EXT_INSTANTIATE)

}  // namespace optim_ext::cuda
