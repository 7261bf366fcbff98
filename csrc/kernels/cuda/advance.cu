// Counts that live on the device: of steps, and of those that drew random words.
#include "../../device/kernel.h"
#include "launch.h"

namespace optim_ext::cuda {

namespace {

// The number of this thread's counter; beyond the last one where it has none to advance.
template <int64_t kBytes>
OPTIM_EXT_DEVICE int counter_of_thread(const Counters<kBytes>& counters) {
  const int i = static_cast<int>(device::block_x()) * kThreads + static_cast<int>(device::thread_x());
  return (counters.found_inf && *counters.found_inf == 1.0f) ? counters.count : i;
}

// A count may serve several parameters, and is then advanced for each of them.
template <int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
advance(OPTIM_EXT_ARGUMENT(Counters<kBytes>) counters) {
  const int i = counter_of_thread(counters);
  if (i >= counters.count) return;
  if (i < counters.floats) {
    device::atomic_add(static_cast<float*>(counters.counter[i]), 1.0f);
  } else {
    device::atomic_add(static_cast<double*>(counters.counter[i]), 1.0);
  }
}

template <int64_t kBytes>
OPTIM_EXT_KERNEL(kThreads)
advance_draws(OPTIM_EXT_ARGUMENT(Counters<kBytes>) counters) {
  const int i = counter_of_thread(counters);
  if (i < counters.count) device::atomic_add(static_cast<unsigned long long*>(counters.counter[i]), 1ull);
}

}  // namespace

template <int64_t kBytes>
device::Status launch_advance(const Counters<kBytes>& counters, device::Stream stream) {
  return launch_blocks(&advance<kBytes>, counters, (counters.count + kThreads - 1) / kThreads, stream);
}

template <int64_t kBytes>
device::Status launch_advance_draws(const Counters<kBytes>& counters, device::Stream stream) {
  return launch_blocks(&advance_draws<kBytes>, counters, (counters.count + kThreads - 1) / kThreads, stream);
}

template device::Status launch_advance<kArgumentBytes>(const Counters<kArgumentBytes>&, device::Stream);
template device::Status launch_advance_draws<kArgumentBytes>(const Counters<kArgumentBytes>&, device::Stream);

}  // namespace optim_ext::cuda
