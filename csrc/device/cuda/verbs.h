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

// Kernels that were compiled while the process runs: a module is loaded for the current device, and stays; kernels are
// found in it by name, and launched with one argument.
struct Module_;
struct Kernel_;
using Module = Module_*;
using Kernel = Kernel_*;
Status load(const void* image, Module& module);
Status find(Module module, const char* name, Kernel& kernel);
Status launch(Kernel kernel, const Grid& grid, int threads, Stream stream, const void* argument);

// Whether the driver at hand takes kMaxArgumentBytes.
bool takes_arguments();

}  // namespace optim_ext::device
