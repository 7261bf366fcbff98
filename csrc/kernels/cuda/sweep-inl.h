// The kernel around a block's work. Each family of rules is a translation unit that includes its header and this file
// and instantiates the kernel for its rules: to change a rule recompiles its own family only.
#include "../../device/kernel.h"
#include "block.h"
#include "launch.h"

namespace optim_ext::cuda {

namespace {

// Blocks a multiprocessor must be able to hold: leaves a thread 80 registers, which every rule fits without spilling.
constexpr int kMinBlocks = 3;

// A step that also averages is a kernel of its own with more registers, so that other steps do not pay for it.
template <class Rule, class V, int64_t kBytes, bool kAveraged>
OPTIM_EXT_KERNEL(kThreads, kAveraged ? kMinBlocks - 1 : kMinBlocks)
sweep(OPTIM_EXT_ARGUMENT(Args<Rule, kBytes>) args) {
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

template <class Rule, int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
advance_scalars(OPTIM_EXT_ARGUMENT(Args<Rule, kBytes>) args) {
  const int32_t index = static_cast<int32_t>(device::block_x()) * kThreads + static_cast<int32_t>(device::thread_x());
  if (index < args.batch.count) store_scalars(args.batch, args.batch.remote ? args.batch.remote : args.room, index);
}

}  // namespace

template <class Rule, class V, int64_t kBytes>
device::Status launch_sweep(const Args<Rule, kBytes>& args, int64_t chunks, device::Stream stream) {
  auto* kernel = &sweep<Rule, V, kBytes, false>;
  if constexpr (kCanAverage<Rule>) {
    if (args.batch.averaged) kernel = &sweep<Rule, V, kBytes, true>;
  }
  device::Status error = launch_blocks(kernel, args, chunks, stream);
  if constexpr (rules::kStoresScalars<Rule>) {
    const int64_t blocks = (args.batch.count + kThreads - 1) / kThreads;
    if (error == device::kSuccess) error = launch_blocks(&advance_scalars<Rule, kBytes>, args, blocks, stream);
  }
  return error;
}

#define OPTIM_EXT_INSTANTIATE(...)                                                  \
  template device::Status launch_sweep<rules::__VA_ARGS__, float, kArgumentBytes>(  \
      const Args<rules::__VA_ARGS__, kArgumentBytes>&, int64_t, device::Stream);    \
  template device::Status launch_sweep<rules::__VA_ARGS__, double, kArgumentBytes>( \
      const Args<rules::__VA_ARGS__, kArgumentBytes>&, int64_t, device::Stream);

}  // namespace optim_ext::cuda
