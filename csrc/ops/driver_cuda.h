// The loop over tensors on a GPU (kernels/cuda/driver.h) with torch's memory, on torch's current stream.
#pragma once

#include <c10/core/DeviceGuard.h>

#include <deque>
#include <vector>

#include "../kernels/cuda/driver.h"
#include "../rules/norm.h"
#include "../call/call.h"
#include "driver_cpu.h"

namespace optim_ext::ops {

class CudaTable;
class CudaScratch;

// Where a call runs.
struct CudaPlace {
  using Table = CudaTable;
  using Scratch = CudaScratch;

  explicit CudaPlace(at::Device device);
  static void check(device::Status status);  // throws what torch throws for a CUDA error
  static void require(bool condition, const char* message) { TORCH_CHECK(condition, message); }

  device::Stream stream;
  bool capturing;  // into a CUDA graph: whatever is launched will be replayed when this call's memory is long gone
  int multiprocessors;
};

// Memory for a table too large for kernel arguments: written on the host, sent along the current stream. Both copies go
// back to torch's caching allocators, which reuse them only once the stream has passed this point.
class CudaTable {
 public:
  CudaTable(const CudaPlace& place, int64_t bytes);
  unsigned char* host() const { return static_cast<unsigned char*>(host_.get()); }
  const unsigned char* send();

 private:
  const CudaPlace& place_;
  const int64_t bytes_;
  at::DataPtr host_, device_;
};

// Memory of the current device for the length of a call, from torch's caching allocator: reused for work of the current
// stream only.
class CudaScratch {
 public:
  explicit CudaScratch(int64_t bytes);
  void* data() const { return data_.get(); }

 private:
  at::DataPtr data_;
};

struct CudaDriver {
  template <class Rule>
  static void run(const Rule& rule, const Work& call) {
    if (call.device.is_cpu()) return CpuDriver::run(rule, call);  // a tensor on the GPU among the hyper-parameters
    const c10::DeviceGuard guard(call.device);
    const CudaPlace place(call.device);
    cuda::Driver(place).run(rule, call);
  }
  // The same without the rule's type, on a GPU.
  static void run(const cuda::Program& program, const void* rule, const Work& call);

  // One result for all tensors of the call.
  template <class Reduction>
  static void reduce_all(const Work& call, const NormOutcome& outcome) {
    const c10::DeviceGuard guard(call.device);
    const CudaPlace place(call.device);
    cuda::Driver(place).template reduce_all<Reduction>(call, outcome);
  }

  // One result per tensor.
  template <class Reduction>
  static void reduce_each(const Work& call, double* results) {
    if (call.device.is_cpu()) return CpuDriver::reduce_each<Reduction>(call, results);
    const c10::DeviceGuard guard(call.device);
    const CudaPlace place(call.device);
    cuda::Driver(place).template reduce_each<Reduction>(call, results);
  }

  // As CpuDriver's. Here the last operand is in memory, until its norms are known.
  template <class Rule>
  static void run_for_norms(const Rule& rule, const Work& call, double* param_norms, double* last_norms) {
    if (call.device.is_cpu()) return CpuDriver::run_for_norms(rule, call, param_norms, last_norms);
    constexpr int kLast = Rule::kOperands - 1;
    const c10::DeviceGuard guard(call.device);
    Work work = call;
    std::deque<Layout> layouts;
    int64_t bytes = 0;
    for (Bundle& bundle : work.bundles) {
      bundle.average = nullptr;
      bundle.storage[kLast] = bundle.in_double ? Storage::f64 : Storage::f32;
      bytes += bytes_for(bundle.numel, bundle.storage[kLast]);
      if (!bundle.layout) continue;
      Layout& layout = layouts.emplace_back(*bundle.layout);
      layout.make_dense(kLast);
      bundle.layout = &layout;
    }
    const CudaScratch scratch(bytes);
    auto* memory = static_cast<unsigned char*>(scratch.data());
    for (Bundle& bundle : work.bundles) {
      bundle.data[kLast] = memory;
      memory += bytes_for(bundle.numel, bundle.storage[kLast]);
    }
    run(rule, work);
    reduce_each<rules::L2Norm>(work, param_norms);
    reduce_each<rules::L2Norm>(OneOperand(work, kLast), last_norms);
  }

  // The pieces of all fibers.
  template <class Reduction>
  static void reduce_fibers(at::Device device, const std::vector<Fibers>& tensors) {
    if (device.is_cpu()) return CpuDriver::reduce_fibers<Reduction>(device, tensors);
    const c10::DeviceGuard guard(device);
    const CudaPlace place(device);
    cuda::Driver(place).template reduce_fibers<Reduction>(tensors);
  }

  // The vectors of L-BFGS. The task's lists of rows and coefficients are on the host, `out` is on the device; nothing
  // is waited for.
  static void history_dots(at::Device device, const HistoryDots& task, double* out);
  static void history_combine(at::Device device, const HistoryCombination& task, Norms* out);
  static void norms(at::Device device, const NormsOf& task, Norms* out);

 private:
  // Of a tensor, so that the next one is aligned as any vector access asks for.
  static int64_t bytes_for(int64_t numel, Storage storage) { return (numel * bytes_of(storage) + 255) / 256 * 256; }
};

}  // namespace optim_ext::ops
