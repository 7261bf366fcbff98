// What the host asks of a device. The verbs have two forms of the same meaning: cuda/ is the GPU, double/ stands in for
// it on a CPU, so that the same kernels and the same loops over tensors run where there is no GPU. (Memory is allocated
// by the caller: in a process with torch it has to come from torch's allocators.)
//
//   launch(kernel, grid, threads, stream, arguments...)
//   zero(memory, bytes, stream), upload(to, from, bytes, stream)
//   capturing(stream, answer), multiprocessors(device), takes_arguments()
//   load(image, module), find(module, name, kernel), launch(kernel, grid, threads, stream, argument): where there is
//   torch
//
// Nothing here waits for the device.
#pragma once

#include <cstdint>
#include <type_traits>

namespace optim_ext::device {

// Blocks of a launch.
struct Grid {
  int64_t x, y = 1;
};

// What hardware takes.
constexpr int64_t kMaxBlocksX = INT32_MAX, kMaxBlocksY = 65535;

inline bool fits(const Grid& grid) {
  return grid.x > 0 && grid.x <= kMaxBlocksX && grid.y > 0 && grid.y <= kMaxBlocksY;
}

// Room for kernel arguments, as drivers since CUDA 12.1 have it on sm_70 and newer.
constexpr int64_t kMaxArgumentBytes = 32764;

}  // namespace optim_ext::device

#if defined(OPTIM_EXT_DEVICE_DOUBLE)
#include "double/device.h"
#else
#include "cuda/device.h"
#endif
