#include "driver_cuda.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace optim_ext::ops {

CudaPlace::CudaPlace(at::Device device)
    : stream(c10::cuda::getCurrentCUDAStream(device.index())), multiprocessors(cuda::multiprocessors(device.index())) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  capturing = status != cudaStreamCaptureStatusNone;
}

CudaTable::CudaTable(const CudaPlace& place, int64_t bytes)
    : place_(place),
      bytes_(bytes),
      host_(at::getHostAllocator(at::kCUDA)->allocate(static_cast<size_t>(bytes))),
      device_(c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes))) {}

const unsigned char* CudaTable::send() {
  check_cuda(
      cudaMemcpyAsync(device_.get(), host_.get(), static_cast<size_t>(bytes_), cudaMemcpyHostToDevice, place_.stream));
  const auto stream = c10::cuda::getCurrentCUDAStream(device_.device().index());
  at::getHostAllocator(at::kCUDA)->record_event(host_.get(), host_.get_context(), stream.unwrap());
  return static_cast<const unsigned char*>(device_.get());
}

void check_cuda(cudaError_t error) { C10_CUDA_CHECK(error); }

namespace {

template <int64_t kBytes>
void advance(const std::vector<std::vector<void*>>& counters_by_storage, const Work& call, const CudaPlace& place) {
  cuda::Counters<kBytes> counters;
  counters.found_inf = call.pass.device_found_inf;
  counters.count = counters.floats = 0;
  const auto launch = [&] {
    check_cuda(cuda::launch_advance<kBytes>(counters, place.stream));
    counters.count = counters.floats = 0;
  };
  for (size_t kind = 0; kind < counters_by_storage.size(); ++kind) {
    for (void* counter : counters_by_storage[kind]) {
      if (counters.count == cuda::Counters<kBytes>::kRoom) launch();
      counters.counter[counters.count++] = counter;
      if (kind == 0) counters.floats = counters.count;
    }
  }
  launch();
}

}  // namespace

void advance_counters(const Work& call, const CudaPlace& place) {
  std::vector<std::vector<void*>> counters(2);  // floats, then doubles
  for (const Bundle& bundle : call.bundles) {
    if (bundle.device_step)
      counters[bundle.step_storage == Storage::f64].push_back(const_cast<void*>(bundle.device_step));
  }
  const bool large =
      cuda::argument_bytes() >= cuda::kLargeArgs &&
      counters[0].size() + counters[1].size() > static_cast<size_t>(cuda::Counters<cuda::kSmallArgs>::kRoom);
  large ? advance<cuda::kLargeArgs>(counters, call, place) : advance<cuda::kSmallArgs>(counters, call, place);
}

}  // namespace optim_ext::ops
