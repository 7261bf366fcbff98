#include "driver_cuda.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace optim_ext::ops {

CudaPlace::CudaPlace(at::Device device)
    : stream(c10::cuda::getCurrentCUDAStream(device.index())),
      multiprocessors(device::multiprocessors(device.index())) {
  TORCH_CHECK(device::takes_arguments(), "optim_ext needs a CUDA driver of version 12.1 or newer");
  check(device::capturing(stream, capturing));
}

CudaTable::CudaTable(const CudaPlace& place, int64_t bytes)
    : place_(place),
      bytes_(bytes),
      host_(at::getHostAllocator(at::kCUDA)->allocate(static_cast<size_t>(bytes))),
      device_(c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes))) {}

const unsigned char* CudaTable::send() {
  CudaPlace::check(device::upload(device_.get(), host_.get(), bytes_, place_.stream));
  const auto stream = c10::cuda::getCurrentCUDAStream(device_.device().index());
  at::getHostAllocator(at::kCUDA)->record_event(host_.get(), host_.get_context(), stream.unwrap());
  return static_cast<const unsigned char*>(device_.get());
}

CudaScratch::CudaScratch(int64_t bytes)
    : data_(c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes))) {}

void CudaPlace::check(device::Status status) { C10_CUDA_CHECK(status); }

void CudaDriver::run(const cuda::Program& program, const void* rule, const Work& call) {
  const c10::DeviceGuard guard(call.device);
  const CudaPlace place(call.device);
  cuda::Driver(place).run(program, rule, call);
}

void CudaDriver::history_dots(at::Device device, const HistoryDots& task, double* out) {
  const c10::DeviceGuard guard(device);
  const CudaPlace place(device);
  cuda::Driver(place).history_dots(task, out);
}

void CudaDriver::history_combine(at::Device device, const HistoryCombination& task, Norms* out) {
  const c10::DeviceGuard guard(device);
  const CudaPlace place(device);
  cuda::Driver(place).history_combine(task, out);
}

void CudaDriver::norms(at::Device device, const NormsOf& task, Norms* out) {
  const c10::DeviceGuard guard(device);
  const CudaPlace place(device);
  cuda::Driver(place).norms(task, out);
}

}  // namespace optim_ext::ops
