// Several threads for the host code: for the loops over elements and for those over many tensors.
#pragma once

#include <ATen/Parallel.h>

namespace optim_ext::ops {

// True in a child of fork(): its parent's OpenMP threads are gone and waiting for them would hang, so it runs on one.
bool in_forked_child();

// Calls work(begin, end) for parts of [0, count) on as many threads as that is worth.
template <class Body>
void in_parallel(int64_t count, int64_t grain, const Body& work) {
  if (in_forked_child()) {
    work(int64_t{0}, count);
  } else {
    at::parallel_for(0, count, grain, work);
  }
}

// Tensors whose headers are read by one thread. Each is several cache misses, which is what small steps spend their
// time on. Every loop over the tensors of a call deals them out alike, so that a thread finds in its cache what it has
// read before.
constexpr int64_t kTensorGrain = 128;

// The same for the tensors [0, count) of a call on `device`. Where a GPU does the work, no thread is woken.
template <class Body>
void over_tensors(at::Device device, int64_t count, const Body& work) {
  in_parallel(count, device.is_cpu() ? kTensorGrain : count, work);
}

}  // namespace optim_ext::ops
