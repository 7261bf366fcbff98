// The loop over tensors on a GPU: tables are filled, kernels launched on the current stream, nothing is waited for.
#pragma once

#include <c10/core/DeviceGuard.h>

#include <vector>

#include "../kernels/cuda/history.h"
#include "../kernels/cuda/launch.h"
#include "../rules/all_rules.h"
#include "call.h"
#include "driver_cpu.h"

namespace optim_ext::ops {

// Where a call runs.
struct CudaPlace {
  explicit CudaPlace(at::Device device);
  cudaStream_t stream;
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

// Throws what torch throws for a CUDA error.
void check_cuda(cudaError_t error);

// Adds one to every step counter that lives on the device, unless the step is skipped there.
void advance_counters(const Work& call, const CudaPlace& place);

struct CudaDriver {
  // One launch for all tensors computed in float and one for those in double, if there are any. While a CUDA graph is
  // captured a table has to travel in the arguments, so a call of hundreds of tensors becomes several launches.
  template <class Rule>
  static void run(const Rule& rule, const Work& call) {
    if (call.device.is_cpu()) return CpuDriver::run(rule, call);  // a tensor on the GPU among the hyper-parameters
    const c10::DeviceGuard guard(call.device);
    const CudaPlace place(call.device);
    if (call.steps_on_device) advance_counters(call, place);
    cuda::Batch<Rule> batch{};
    batch.rule = rule;
    batch.grad_scale = call.pass.device_grad_scale;
    batch.found_inf = call.pass.device_found_inf;
    batch.grad_factor = call.pass.device_grad_factor;
    batch.grad_factor_storage = call.pass.grad_factor_storage;
    TORCH_INTERNAL_ASSERT(call.device_hypers.size() <= static_cast<size_t>(cuda::kMaxLiveHypers));
    for (const DeviceHyper& hyper : call.device_hypers) {
      batch.hypers[batch.hyper_count++] = {hyper.offset, hyper.value, hyper.storage};
    }
    sweep<float>(batch, call, place);
    sweep<double>(batch, call, place);
  }

  // The vectors of L-BFGS. The task's lists of rows and coefficients are on the host, `out` is on the device; nothing
  // is waited for.
  static void history_dots(at::Device device, const HistoryDots& task, double* out);
  static void history_combine(at::Device device, const HistoryCombination& task, Norms* out);
  static void norms(at::Device device, const NormsOf& task, Norms* out);

 private:
  template <class V, class Rule>
  static void sweep(cuda::Batch<Rule> batch, const Work& call, const CudaPlace& place) {
    std::vector<const Bundle*> bundles;
    bundles.reserve(call.bundles.size());
    int64_t elements = 0;
    for (size_t i = 0; i < call.bundles.size(); ++i) {
      if ((call.in_double[i] != 0) != (sizeof(V) == sizeof(double)) || call.bundles[i].numel == 0) continue;
      bundles.push_back(&call.bundles[i]);
      elements += call.bundles[i].numel;
    }
    batch.chunk = cuda::chunk_for(elements, place.multiprocessors);
    const bool large = cuda::argument_bytes() >= cuda::kLargeArgs;
    const int64_t room = large ? cuda::Args<Rule, cuda::kLargeArgs>::kRoom : cuda::Args<Rule, cuda::kSmallArgs>::kRoom;
    const auto count = static_cast<int64_t>(bundles.size());
    for (int64_t done = 0; done < count;) {
      const Bundle* const* const next = bundles.data() + done;
      auto shape = cuda::fitting<Rule>(next, count - done, room);
      if (shape.count < count - done && !place.capturing) {
        shape = cuda::fitting<Rule>(next, count - done, INT64_MAX);
        launch_remote<V>(batch, next, shape, place);
      } else if (shape.bytes() <= cuda::Args<Rule, cuda::kSmallArgs>::kRoom) {
        launch<V, cuda::kSmallArgs>(batch, next, shape, place);
      } else {
        launch<V, cuda::kLargeArgs>(batch, next, shape, place);
      }
      done += shape.count;
    }
  }

  template <class V, int64_t kBytes, class Rule>
  static void launch(const cuda::Batch<Rule>& batch, const Bundle* const* bundles, const cuda::TableShape<Rule>& shape,
                     const CudaPlace& place) {
    cuda::Args<Rule, kBytes> args;  // the room that no table fills stays as it is
    args.batch = batch;
    args.batch.count = static_cast<int32_t>(shape.count);
    const int64_t chunks = cuda::fill_table(bundles, shape, batch.chunk, args.room);
    check_cuda(cuda::launch_sweep<Rule, V, kBytes>(args, chunks, place.stream));
  }

  template <class V, class Rule>
  static void launch_remote(const cuda::Batch<Rule>& batch, const Bundle* const* bundles,
                            const cuda::TableShape<Rule>& shape, const CudaPlace& place) {
    CudaTable table(place, shape.bytes());
    cuda::Args<Rule, cuda::kSmallArgs> args;
    args.batch = batch;
    args.batch.count = static_cast<int32_t>(shape.count);
    const int64_t chunks = cuda::fill_table(bundles, shape, batch.chunk, table.host());
    args.batch.remote = table.send();
    check_cuda(cuda::launch_sweep<Rule, V, cuda::kSmallArgs>(args, chunks, place.stream));
  }
};

}  // namespace optim_ext::ops
