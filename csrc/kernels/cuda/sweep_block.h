// What a block of a sweep does, for the kernels around it: those of this library (sweep-inl.h), and those of a rule
// that is compiled while the process runs (one_rule.h).
#pragma once

#include "../../device/kernel.h"
#include "block.h"

namespace optim_ext::cuda {

// Blocks a multiprocessor must be able to hold: three leave a thread 80 registers, which every rule of this library
// fits without spilling. A step that also averages is a kernel of its own with more registers, so that other steps do
// not pay for it.
constexpr int min_blocks(bool averaged) { return averaged ? 2 : 3; }

template <class Rule, class V, bool kAveraged, int64_t kBytes>
OPTIM_EXT_DEVICE void sweep_block(const Args<Rule, kBytes>& args) {
  OPTIM_EXT_SHARED(block, Block<Rule>);
  const unsigned char* const table = args.batch.remote ? args.batch.remote : args.room;
  if (device::thread_x() == 0) open_block(args.batch, table, device::block_x(), block);
  device::barrier();
  if (block.skip) return;
  sweep_thread<Rule, V>(block, static_cast<int>(device::thread_x()));
  if constexpr (kAveraged) {
    OPTIM_EXT_SHARED(average, Block<rules::Average>);
    if (device::thread_x() == 0) open_average(args.batch, table, block, average);
    device::barrier();
    if (!average.skip) average_thread(average, static_cast<int>(device::thread_x()));
  }
}

// A thread for each tensor of the table, where the rule has scalars to store.
template <class Rule, class EntryOf = Entry<Rule>, int64_t kBytes>
OPTIM_EXT_DEVICE void advance_scalars_of_thread(const Args<Rule, kBytes>& args) {
  if constexpr (rules::kStoresScalars<Rule>) {
    const int32_t index = static_cast<int32_t>(device::block_x()) * kThreads + static_cast<int32_t>(device::thread_x());
    const unsigned char* const table = args.batch.remote ? args.batch.remote : args.room;
    if (index < args.batch.count) store_scalars<Rule>(args.batch, entries_of<EntryOf>(args.batch, table)[index]);
  }
}

}  // namespace optim_ext::cuda
