// The words of kernels on a GPU: CUDA's own.
#pragma once

#if defined(__CUDACC_RTC__)
#include "runtime_compiled.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#if CUDART_VERSION < 12010
#error "optim_ext needs CUDA 12.1 or newer"
#endif
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#error "optim_ext needs compute capability 7.0 or newer; narrow TORCH_CUDA_ARCH_LIST"
#endif

#define OPTIM_EXT_DEVICE inline __device__
#define OPTIM_EXT_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define OPTIM_EXT_ARGUMENT(...) const __grid_constant__ __VA_ARGS__
#define OPTIM_EXT_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name

namespace optim_ext::device {

OPTIM_EXT_DEVICE unsigned thread_x() { return threadIdx.x; }
OPTIM_EXT_DEVICE unsigned block_x() { return blockIdx.x; }
OPTIM_EXT_DEVICE unsigned block_y() { return blockIdx.y; }
OPTIM_EXT_DEVICE unsigned blocks_y() { return gridDim.y; }

OPTIM_EXT_DEVICE void barrier() { __syncthreads(); }

// The value that the lane `apart` further on in the same group of `width` lanes gave; the lane's own past its end.
OPTIM_EXT_DEVICE double shuffle_down(unsigned mask, double value, int apart, int width = 32) {
  return __shfl_down_sync(mask, value, static_cast<unsigned>(apart), width);
}

// The value that lane `lane` of the same group of `width` lanes gave.
OPTIM_EXT_DEVICE uint32_t shuffle_from(unsigned mask, uint32_t value, int lane, int width = 32) {
  return __shfl_sync(mask, value, lane, width);
}

// The value of the lane whose number differs in the bits of `lanes`.
OPTIM_EXT_DEVICE uint32_t shuffle_xor(unsigned mask, uint32_t value, int lanes) {
  return __shfl_xor_sync(mask, value, lanes);
}

// What was written before it is seen, by whoever sees what is written after it, on the whole device.
OPTIM_EXT_DEVICE void fence() { __threadfence(); }

// Gives what was there before.
template <class T>
OPTIM_EXT_DEVICE T atomic_add(T* to, T value) {
  return atomicAdd(to, value);
}

// For what other blocks of this launch have written: the L1 cache of this one may hold what was there before.
OPTIM_EXT_DEVICE double load_past_l1(const double* from) { return __ldcg(from); }

}  // namespace optim_ext::device
