// Reductions on a GPU: one launch fills the slots of all tensors, and its last block turns them into the outcome.
#include "../../device/kernel.h"
#include "../../rules/reductions.h"
#include "launch.h"
#include "reduce_block.h"

namespace optim_ext::cuda {

namespace {

constexpr int kWarps = kThreads / kLanes;

// Lane 0 gets the lanes of its warp combined pairwise, in reduce_tile()'s order.
template <class Rule>
OPTIM_EXT_DEVICE double combine_lanes(double value) {
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
    value = Rule::combine(value, device::shuffle_down(0xffffffffu, value, width));
  }
  return value;
}

// Thread 0 of the block gets `count` slots combined, tile by tile. They were written by other blocks, so they are read
// past the L1 cache.
template <class Rule>
OPTIM_EXT_DEVICE double combine_slots(const double* slots, int64_t count) {
  OPTIM_EXT_SHARED(of_warp, double[kWarps]);
  const int warp = static_cast<int>(device::thread_x()) / kLanes, lane = static_cast<int>(device::thread_x()) % kLanes;
  double result = 0.0;
  for (int64_t round = 0; round < count; round += kWarps * kReduceTile) {
    const double* const tile = slots + round + warp * kReduceTile;
    const int64_t left = count - round - warp * kReduceTile;
    const double sum = combine_lanes<Rule>(reduce_lane<rules::Combined<Rule>>(
        left < kReduceTile ? left : kReduceTile, lane, [=](int64_t i) { return device::load_past_l1(tile + i); }));
    if (lane == 0) of_warp[warp] = sum;
    device::barrier();
    if (device::thread_x() == 0) {
      for (int w = 0; w < kWarps; ++w) result = Rule::combine(result, of_warp[w]);
    }
    device::barrier();
  }
  return result;
}

template <class Reduction, int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
reduce(OPTIM_EXT_ARGUMENT(Args<ReduceJob<Reduction>, kBytes>) args) {
  OPTIM_EXT_SHARED(block, Block<ReduceJob<Reduction>>);
  OPTIM_EXT_SHARED(is_last, bool);
  if (device::thread_x() == 0)
    open_block(args.batch, args.batch.remote ? args.batch.remote : args.room, device::block_x(), block);
  device::barrier();
  const int warp = static_cast<int>(device::thread_x()) / kLanes, lane = static_cast<int>(device::thread_x()) % kLanes;
  const double sum = combine_lanes<Reduction>(reduce_thread(block, warp, lane));
  const ReduceJob<Reduction>& job = block.rule;
  if (lane == 0) {
    job.slots[device::block_x() * kReduceSlots + warp] = sum;
    device::fence();
  }
  if (!job.finished) return;
  device::barrier();
  if (device::thread_x() == 0) is_last = device::atomic_add(job.finished, 1u) == job.blocks - 1;
  device::barrier();
  if (!is_last) return;
  device::fence();
  const double total = combine_slots<Reduction>(job.all_slots, static_cast<int64_t>(job.blocks) * kReduceSlots);
  if (device::thread_x() == 0) job.outcome.write(Reduction::finish(total, job.count));
}

// Fills slots with what parameters are together with what lies beside them, for a result per tensor.
template <class Reduction, int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
reduce_kept(OPTIM_EXT_ARGUMENT(Args<ReduceJob<Reduction>, kBytes>) args) {
  OPTIM_EXT_SHARED(block, KeptReduceBlock<Reduction>);
  const int warp = static_cast<int>(device::thread_x()) / kLanes, lane = static_cast<int>(device::thread_x()) % kLanes;
  if (device::thread_x() == 0)
    open_kept_reduce(args.batch, args.batch.remote ? args.batch.remote : args.room, device::block_x(), block);
  device::barrier();
  const double sum = combine_lanes<Reduction>(reduce_kept_thread(block, warp, lane));
  if (lane == 0) block.rule.slots[device::block_x() * kReduceSlots + warp] = sum;
}

// One block per tensor of a table whose slots are filled.
template <class Reduction, class EntryOf, int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
finish_each(OPTIM_EXT_ARGUMENT(Args<ReduceJob<Reduction>, kBytes>) args) {
  const ReduceJob<Reduction>& job = args.batch.rule;
  const unsigned char* const table = args.batch.remote ? args.batch.remote : args.room;
  const int32_t* const first_chunk = reinterpret_cast<const int32_t*>(table);
  const int32_t tensor = static_cast<int32_t>(device::block_x());
  const int32_t begin = first_chunk[tensor], end = tensor + 1 < args.batch.count ? first_chunk[tensor + 1] : job.chunks;
  const double result = combine_slots<Reduction>(job.slots + begin * kReduceSlots, (end - begin) * kReduceSlots);
  const auto count = static_cast<double>(entries_of<EntryOf>(args.batch, table)[tensor].numel);
  if (device::thread_x() == 0) job.each[tensor] = Reduction::finish(result, count);
}

template <class Reduction, int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
reduce_fibers(OPTIM_EXT_ARGUMENT(Args<FiberJob<Reduction>, kBytes>) args) {
  OPTIM_EXT_SHARED(block, Block<FiberJob<Reduction>>);
  if (device::thread_x() == 0)
    open_block(args.batch, args.batch.remote ? args.batch.remote : args.room, device::block_x(), block);
  device::barrier();
  const Fibers fibers = fibers_of(block);
  // Chunks are multiples of a warp, and so are tensors whose pieces are shared by lanes: a warp is there as a whole.
  for (int32_t i = static_cast<int32_t>(device::thread_x()); i < block.size; i += kThreads) {
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
device::Status launch_reduce(const Args<ReduceJob<Reduction>, kBytes>& args, int64_t chunks, device::Stream stream) {
  if constexpr (kReducesKept<Reduction>) {
    if (args.batch.kept) return launch_blocks(&reduce_kept<Reduction, kBytes>, args, chunks, stream);
  }
  return launch_blocks(&reduce<Reduction, kBytes>, args, chunks, stream);
}

template <class Reduction, int64_t kBytes>
device::Status launch_finish_each(const Args<ReduceJob<Reduction>, kBytes>& args, device::Stream stream) {
  using Job = ReduceJob<Reduction>;
  auto* kernel = &finish_each<Reduction, Entry<Job>, kBytes>;
  if constexpr (kReducesKept<Reduction>) {
    if (args.batch.kept) kernel = &finish_each<Reduction, KeptEntry<Job>, kBytes>;
  }
  return launch_blocks(kernel, args, args.batch.count, stream);
}

template <class Reduction, int64_t kBytes>
device::Status launch_fibers(const Args<FiberJob<Reduction>, kBytes>& args, int64_t chunks, device::Stream stream) {
  return launch_blocks(&reduce_fibers<Reduction, kBytes>, args, chunks, stream);
}

#define OPTIM_EXT_INSTANTIATE(...)                                                                           \
  template device::Status launch_reduce(const Args<ReduceJob<rules::__VA_ARGS__>, kArgumentBytes>&, int64_t, \
                                        device::Stream);                                                     \
  template device::Status launch_finish_each(const Args<ReduceJob<rules::__VA_ARGS__>, kArgumentBytes>&,     \
                                             device::Stream);
OPTIM_EXT_FOR_EACH_REDUCTION(OPTIM_EXT_INSTANTIATE)
#undef OPTIM_EXT_INSTANTIATE
#define OPTIM_EXT_INSTANTIATE(...)                                                                          \
  template device::Status launch_fibers(const Args<FiberJob<rules::__VA_ARGS__>, kArgumentBytes>&, int64_t, \
                                        device::Stream);
OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(OPTIM_EXT_INSTANTIATE)

}  // namespace optim_ext::cuda
