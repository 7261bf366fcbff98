// The devices themselves, errors, settings, and the record of what the double was asked to do.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core.h"
#include "runtime.h"

namespace cuda_double {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device_of_thread = 0;

std::recursive_mutex& gate() {
  static auto& only = *new std::recursive_mutex;
  return only;
}

bool tracing = false;
std::string& trace() {
  static auto& text = *new std::string;
  return text;
}

Settings read_settings() {
  Settings read;
  const char* const words = std::getenv("CUDA_DOUBLE");
  std::string rest = words ? words : "";
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const std::string word = rest.substr(0, comma);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    if (word == "lazy") {
      read.lazy = true;
    } else if (word == "guard") {
      read.guard = true;
    } else if (word == "closed") {
      read.closed = true;
    } else {
      optim_ext::device::refuse("CUDA_DOUBLE=%s: there are the words lazy, guard and closed", words);
    }
  }
  if (const char* const seed = std::getenv("CUDA_DOUBLE_SEED")) read.seed = std::strtoull(seed, nullptr, 10);
  optim_ext::device::set_seed(read.seed);
  return read;
}

// As those of an H100, where anybody asks.
int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    default: return 0;
  }
}

// What torch takes from the driver by name: nothing that it needs here but this.
int context_state(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}
int not_supported() { return 801; }

}  // namespace

Entered::Entered() : lock_(gate()) { settings(); }

const Settings& settings() {
  static const Settings read = read_settings();
  return read;
}

int current_device() { return device_of_thread; }

cudaError_t fail(cudaError_t error) { return last_error = error; }

void note(Kind kind, const std::string& name) {
  if (!tracing) return;
  constexpr const char* kNames[] = {"kernel", "copy", "memset", "host", "graph", "runtime"};
  trace() += std::string(kNames[static_cast<int>(kind)]) + '\t' + name + '\n';
}

}  // namespace cuda_double

using namespace cuda_double;

extern "C" {

// For Python: what is asked from begin to end, one line each: its kind, a tab, its name.
void cuda_double_begin_trace() {
  const Entered entered;
  trace().clear();
  tracing = true;
}
const char* cuda_double_end_trace() {
  const Entered entered;
  tracing = false;
  return trace().c_str();
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = device_of_thread;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  device_of_thread = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* of, int) {
  std::memset(of, 0, sizeof *of);
  std::snprintf(of->name, sizeof of->name, "a double of a GPU");
  of->major = attribute(cudaDevAttrComputeCapabilityMajor);
  of->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  of->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  of->warpSize = attribute(cudaDevAttrWarpSize);
  of->sharedMemPerBlock = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlock));
  of->sharedMemPerBlockOptin = 227 << 10;
  of->sharedMemPerMultiprocessor = 228 << 10;
  of->maxThreadsPerMultiProcessor = 2048;
  of->regsPerBlock = of->regsPerMultiprocessor = 1 << 16;
  of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
  of->maxThreadsDim[2] = 64;
  of->maxGridSize[0] = INT32_MAX;
  of->maxGridSize[1] = of->maxGridSize[2] = 65535;
  of->l2CacheSize = 50 << 20;
  of->memoryBusWidth = 5120;
  of->unifiedAddressing = of->concurrentKernels = 1;
  size_t free = 0;
  return cudaMemGetInfo(&free, &of->totalGlobalMem);
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* to, int size, int device) {
  std::snprintf(to, static_cast<size_t>(size), "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0 ? reinterpret_cast<void*>(&context_state)
                                                                   : reinterpret_cast<void*>(&not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
