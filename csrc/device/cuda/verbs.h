// What the verbs are called with on a GPU, and those that are no templates.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace optim_ext::device {

using Status = cudaError_t;
using Stream = cudaStream_t;
constexpr Status kSuccess = cudaSuccess, kInvalidGrid = cudaErrorInvalidConfiguration;

Status zero(void* memory, int64_t bytes, Stream stream);

// From pinned host memory, which must not change before the stream has passed this point.
Status upload(void* to, const void* from, int64_t bytes, Stream stream);

// Whether work of the stream goes into a graph.
Status capturing(Stream stream, bool& answer);

int multiprocessors(int device);

// Whether the driver at hand takes kMaxArgumentBytes.
bool takes_arguments();

}  // namespace optim_ext::device
