// Step counters that live on the device, and what the host needs to know about the device.
#include <cuda_runtime.h>

#include "launch.h"

namespace optim_ext::cuda {

namespace {

// A count may serve several parameters, and is then advanced for each of them.
template <int64_t kBytes>
__global__ void __launch_bounds__(kThreads) advance(const __grid_constant__ Counters<kBytes> counters) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= counters.count || (counters.found_inf && *counters.found_inf == 1.0f)) return;
  if (i < counters.floats) {
    atomicAdd(static_cast<float*>(counters.counter[i]), 1.0f);
  } else {
    atomicAdd(static_cast<double*>(counters.counter[i]), 1.0);
  }
}

}  // namespace

bool takes_arguments() {
  static const bool takes = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return takes;
}

int multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0 ? count : 1;
}

template <int64_t kBytes>
cudaError_t launch_advance(const Counters<kBytes>& counters, cudaStream_t stream) {
  return launch_blocks(&advance<kBytes>, counters, (counters.count + kThreads - 1) / kThreads, stream);
}

template cudaError_t launch_advance<kArgumentBytes>(const Counters<kArgumentBytes>&, cudaStream_t);

}  // namespace optim_ext::cuda
