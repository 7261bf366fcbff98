#include "driver_cuda.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>

namespace optim_ext::ops {

CudaPlace::CudaPlace(at::Device device)
    : stream(c10::cuda::getCurrentCUDAStream(device.index())),
      multiprocessors(device::multiprocessors(device.index())) {
  TORCH_CHECK(device::takes_arguments(), "optim_ext needs a CUDA driver of version 12.1 or newer");
  check_cuda(device::capturing(stream, capturing));
}

CudaTable::CudaTable(const CudaPlace& place, int64_t bytes)
    : place_(place),
      bytes_(bytes),
      host_(at::getHostAllocator(at::kCUDA)->allocate(static_cast<size_t>(bytes))),
      device_(c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes))) {}

const unsigned char* CudaTable::send() {
  check_cuda(device::upload(device_.get(), host_.get(), bytes_, place_.stream));
  const auto stream = c10::cuda::getCurrentCUDAStream(device_.device().index());
  at::getHostAllocator(at::kCUDA)->record_event(host_.get(), host_.get_context(), stream.unwrap());
  return static_cast<const unsigned char*>(device_.get());
}

CudaScratch::CudaScratch(int64_t bytes)
    : data_(c10::cuda::CUDACachingAllocator::get()->allocate(static_cast<size_t>(bytes))) {}

void check_cuda(device::Status error) { C10_CUDA_CHECK(error); }

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
  advance<cuda::kArgumentBytes>(counters, call, place);
}

namespace {

// Sends what a task keeps on the host, one block of 8-byte values after the other, to the device.
const unsigned char* send(CudaTable& table, std::initializer_list<std::pair<const void*, int64_t>> blocks) {
  unsigned char* to = table.host();
  for (const auto& [data, count] : blocks) {
    if (count > 0) std::memcpy(to, data, static_cast<size_t>(8 * count));
    to += 8 * count;
  }
  return table.send();
}

void* const* rows_at(const unsigned char* table, int64_t index) {
  return reinterpret_cast<void* const*>(table + 8 * index);
}

}  // namespace

void CudaDriver::history_dots(at::Device device, const HistoryDots& given, double* out) {
  const c10::DeviceGuard guard(device);
  const CudaPlace place(device);
  HistoryDots task = given;
  const int64_t count = task.history.count;
  CudaTable table(place, std::max<int64_t>(8, 16 * count));
  const unsigned char* const sent = send(table, {{task.history.old_dirs, count}, {task.history.old_stps, count}});
  task.history.old_dirs = rows_at(sent, 0);
  task.history.old_stps = rows_at(sent, count);
  const CudaScratch sums(8 * task.sums() * history_tiles(task.numel));
  check_cuda(cuda::launch_history_dots(task, static_cast<double*>(sums.data()), out, place.stream));
}

void CudaDriver::history_combine(at::Device device, const HistoryCombination& given, Norms* out) {
  const c10::DeviceGuard guard(device);
  const CudaPlace place(device);
  HistoryCombination task = given;
  const int64_t count = task.history.count;
  CudaTable table(place, std::max<int64_t>(8, 32 * count));
  const unsigned char* const sent = send(table, {{task.history.old_dirs, count},
                                                 {task.history.old_stps, count},
                                                 {task.y_coefficient, count},
                                                 {task.s_coefficient, count}});
  task.history.old_dirs = rows_at(sent, 0);
  task.history.old_stps = rows_at(sent, count);
  task.y_coefficient = reinterpret_cast<const double*>(sent) + 2 * count;
  task.s_coefficient = reinterpret_cast<const double*>(sent) + 3 * count;
  const CudaScratch norms(static_cast<int64_t>(sizeof(Norms)) * history_tiles(task.numel));
  check_cuda(cuda::launch_history_combine(task, static_cast<Norms*>(norms.data()), out, place.stream));
}

void CudaDriver::norms(at::Device device, const NormsOf& task, Norms* out) {
  const c10::DeviceGuard guard(device);
  const CudaPlace place(device);
  const CudaScratch norms(static_cast<int64_t>(sizeof(Norms)) * history_tiles(task.numel));
  check_cuda(cuda::launch_norms(task, static_cast<Norms*>(norms.data()), out, place.stream));
}

}  // namespace optim_ext::ops
