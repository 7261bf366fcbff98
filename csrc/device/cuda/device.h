// The verbs on a GPU.
#pragma once

#include <cuda_runtime_api.h>

namespace optim_ext::device {

using Status = cudaError_t;
using Stream = cudaStream_t;
constexpr Status kSuccess = cudaSuccess, kInvalidGrid = cudaErrorInvalidConfiguration;

template <class... Parameters>
Status launch(void (*kernel)(Parameters...), const Grid& grid, int threads, Stream stream,
              const std::type_identity_t<Parameters>&... arguments) {
  if (!fits(grid)) return kInvalidGrid;
  void* pointers[] = {const_cast<Parameters*>(&arguments)...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)),
                          dim3(static_cast<unsigned>(threads)), pointers, 0, stream);
}

Status zero(void* memory, int64_t bytes, Stream stream);

// From pinned host memory, which must not change before the stream has passed this point.
Status upload(void* to, const void* from, int64_t bytes, Stream stream);

// Whether work of the stream goes into a graph.
Status capturing(Stream stream, bool& answer);

int multiprocessors(int device);

// Whether the driver at hand takes kMaxArgumentBytes.
bool takes_arguments();

}  // namespace optim_ext::device
