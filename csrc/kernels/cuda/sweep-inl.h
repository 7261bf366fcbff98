// The kernel around a block's work, instantiated for every rule with the value type OPTIM_EXT_VALUE. Two files include
// this, so that a build with two jobs compiles them side by side.
#include <cuda_runtime.h>

#include "../../rules/all_rules.h"
#include "block.h"
#include "launch.h"

#if CUDART_VERSION < 12010
#error "optim_ext needs CUDA 12.1 or newer"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#error "optim_ext needs compute capability 7.0 or newer; narrow TORCH_CUDA_ARCH_LIST"
#endif

namespace optim_ext::cuda {

namespace {

// Blocks a multiprocessor must be able to hold: leaves a thread 80 registers, which every rule fits without spilling.
constexpr int kMinBlocks = 3;

// A step that also averages is a kernel of its own with more registers, so that other steps do not pay for it.
template <class Rule, class V, int64_t kBytes, bool kAveraged>
__global__ void __launch_bounds__(kThreads, kAveraged ? kMinBlocks - 1 : kMinBlocks)
    sweep(const __grid_constant__ Args<Rule, kBytes> args) {
  __shared__ Block<Rule> block;
  const unsigned char* const table = args.batch.remote ? args.batch.remote : args.room;
  if (threadIdx.x == 0) open_block(args.batch, table, blockIdx.x, block);
  __syncthreads();
  if (block.skip) return;
  sweep_thread<Rule, V>(block, static_cast<int>(threadIdx.x));
  if constexpr (kAveraged) {
    __shared__ Block<rules::Average> average;
    if (threadIdx.x == 0) open_average(args.batch, table, block, average);
    __syncthreads();
    if (!average.skip) average_thread(average, static_cast<int>(threadIdx.x));
  }
}

template <class Rule, int64_t kBytes>
__global__ void __launch_bounds__(kThreads) advance_scalars(const __grid_constant__ Args<Rule, kBytes> args) {
  const int32_t index = static_cast<int32_t>(blockIdx.x) * kThreads + static_cast<int32_t>(threadIdx.x);
  if (index < args.batch.count) store_scalars(args.batch, args.batch.remote ? args.batch.remote : args.room, index);
}

}  // namespace

template <class Rule, class V, int64_t kBytes>
cudaError_t launch_sweep(const Args<Rule, kBytes>& args, int64_t chunks, cudaStream_t stream) {
  auto* kernel = &sweep<Rule, V, kBytes, false>;
  if constexpr (kCanAverage<Rule>) {
    if (args.batch.averaged) kernel = &sweep<Rule, V, kBytes, true>;
  }
  cudaError_t error = launch_blocks(kernel, args, chunks, stream);
  if constexpr (rules::kStoresScalars<Rule>) {
    const int64_t blocks = (args.batch.count + kThreads - 1) / kThreads;
    if (error == cudaSuccess) error = launch_blocks(&advance_scalars<Rule, kBytes>, args, blocks, stream);
  }
  return error;
}

#define OPTIM_EXT_INSTANTIATE(...)                                                        \
  template cudaError_t launch_sweep<rules::__VA_ARGS__, OPTIM_EXT_VALUE, kArgumentBytes>( \
      const Args<rules::__VA_ARGS__, kArgumentBytes>&, int64_t, cudaStream_t);
OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_INSTANTIATE)

}  // namespace optim_ext::cuda
