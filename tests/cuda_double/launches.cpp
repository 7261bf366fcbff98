// Launches: of our kernels, which the core runs, and of torch's own, which exist as machine code of a GPU only and end
// the process with their name.
#include <cxxabi.h>

#include <cstdlib>
#include <unordered_map>
#include <vector>

#include "core.h"
#include "runtime.h"

namespace optim_ext::device {

Status queue(const Launch& launch, Stream stream) {
  using namespace cuda_double;
  enqueue(stream, Kind::kernel, launch.kernel, [launch] { run_grid(launch); });
  return cudaSuccess;
}

}  // namespace optim_ext::device

namespace cuda_double {
namespace {

// By the address of the function that stands for a kernel on the host.
std::unordered_map<const void*, const char*>& kernel_names() {
  static auto& names = *new std::unordered_map<const void*, const char*>;
  return names;
}

std::string name_of(const void* kernel) {
  const auto found = kernel_names().find(kernel);
  if (found == kernel_names().end()) return "a kernel that was never registered";
  int status = 0;
  char* const readable = abi::__cxa_demangle(found->second, nullptr, nullptr, &status);
  const std::string name = readable ? readable : found->second;
  std::free(readable);
  return name;
}

cudaError_t launch(const void* kernel, cudaStream_t stream) {
  const std::string name = name_of(kernel);
  // torch.cuda._sleep: there is no time here, and a lazy stream is late anyway.
  if (name.find("spin_kernel") != std::string::npos) {
    enqueue(stream, Kind::kernel, "spin_kernel", [] {});
    return cudaSuccess;
  }
  optim_ext::device::refuse("a kernel that the double does not have: %s", name.c_str());
}

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace
}  // namespace cuda_double

using namespace cuda_double;

// What nvcc's code calls.
extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle[8];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernel_names()[kernel] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
  return launch(kernel, how->stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}

// What torch asks of its kernels before it launches them.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = 8;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  *count = 8;
  return cudaSuccess;
}

}  // extern "C"
