// Step counters that live on the device.
#include "../../device/kernel.h"
#include "launch.h"

namespace optim_ext::cuda {

namespace {

// A count may serve several parameters, and is then advanced for each of them.
template <int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
advance(OPTIM_EXT_ARGUMENT(Counters<kBytes>) counters) {
  const int i = static_cast<int>(device::block_x()) * kThreads + static_cast<int>(device::thread_x());
  if (i >= counters.count || (counters.found_inf && *counters.found_inf == 1.0f)) return;
  if (i < counters.floats) {
    device::atomic_add(static_cast<float*>(counters.counter[i]), 1.0f);
  } else {
    device::atomic_add(static_cast<double*>(counters.counter[i]), 1.0);
  }
}

}  // namespace

template <int64_t kBytes>
device::Status launch_advance(const Counters<kBytes>& counters, device::Stream stream) {
  return launch_blocks(&advance<kBytes>, counters, (counters.count + kThreads - 1) / kThreads, stream);
}

template device::Status launch_advance<kArgumentBytes>(const Counters<kArgumentBytes>&, device::Stream);

}  // namespace optim_ext::cuda
