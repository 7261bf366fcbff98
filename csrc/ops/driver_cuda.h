// The loop over tensors on a GPU: tables are filled, kernels launched on the current stream, nothing is waited for.
#pragma once

#include <c10/core/DeviceGuard.h>

#include <deque>
#include <vector>

#include "../kernels/cuda/history.h"
#include "../kernels/cuda/launch.h"
#include "../kernels/cuda/reduce_block.h"
#include "../rules/all_rules.h"
#include "call.h"
#include "driver_cpu.h"

namespace optim_ext::ops {

// Where a call runs.
struct CudaPlace {
  explicit CudaPlace(at::Device device);
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

// Throws what torch throws for a CUDA error.
void check_cuda(device::Status error);

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
    batch.average_weight = call.pass.average_weight;
    batch.live_average_weight = call.pass.device_average_weight;
    batch.average_weight_storage = call.pass.average_weight_storage;
    TORCH_INTERNAL_ASSERT(call.device_hypers.size() <= static_cast<size_t>(cuda::kMaxLiveHypers));
    for (const DeviceHyper& hyper : call.device_hypers) {
      batch.hypers[batch.hyper_count++] = {hyper.offset, hyper.value, hyper.storage};
    }
    sweep<float>(batch, call, place);
    sweep<double>(batch, call, place);
  }

  // One result for all tensors of the call: a launch, unless a graph is captured and the table is long.
  template <class Reduction>
  static void reduce_all(const Work& call, const NormOutcome& outcome) {
    const c10::DeviceGuard guard(call.device);
    const CudaPlace place(call.device);
    std::vector<const Bundle*> bundles;
    int64_t chunks = 0;
    double count = 0.0;
    for (const Bundle& bundle : call.bundles) {
      if (bundle.numel != 0) bundles.push_back(&bundle);
      chunks += reduce_chunks(bundle.numel);
      count += static_cast<double>(bundle.numel);
    }
    TORCH_CHECK(chunks <= INT32_MAX, "optim_ext: more than 2^31 chunks of gradients");
    const CudaScratch scratch((chunks * kReduceSlots + 1) * static_cast<int64_t>(sizeof(double)));
    auto* const finished = static_cast<unsigned*>(scratch.data());
    auto* slots = static_cast<double*>(scratch.data()) + 1;
    check_cuda(device::zero(finished, sizeof(unsigned), place.stream));
    cuda::Batch<cuda::ReduceJob<Reduction>> batch{};
    batch.chunk = kReduceChunk;
    batch.rule.finished = finished;
    batch.rule.blocks = static_cast<unsigned>(chunks);
    batch.rule.all_slots = slots;
    batch.rule.outcome = outcome;
    batch.rule.count = count;
    for_each_table(batch, bundles, place, [&](auto& args, int64_t of_table) {
      args.batch.rule.slots = slots;
      check_cuda(cuda::launch_reduce<Reduction>(args, of_table, place.stream));
      slots += of_table * kReduceSlots;
    });
  }

  // One result per tensor.
  template <class Reduction>
  static void reduce_each(const Work& call, double* results) {
    if (call.device.is_cpu()) return CpuDriver::reduce_each<Reduction>(call, results);
    const c10::DeviceGuard guard(call.device);
    const CudaPlace place(call.device);
    std::vector<const Bundle*> bundles;
    int64_t chunks = 0;
    for (const Bundle& bundle : call.bundles) {
      bundles.push_back(&bundle);
      chunks += reduce_chunks(bundle.numel);
    }
    const CudaScratch scratch(chunks * kReduceSlots * static_cast<int64_t>(sizeof(double)));
    auto* slots = static_cast<double*>(scratch.data());
    cuda::Batch<cuda::ReduceJob<Reduction>> batch{};
    batch.chunk = kReduceChunk;
    for_each_table(batch, bundles, place, [&](auto& args, int64_t of_table) {
      args.batch.rule.slots = slots;
      args.batch.rule.each = results;
      args.batch.rule.chunks = static_cast<int32_t>(of_table);
      check_cuda(cuda::launch_reduce<Reduction>(args, of_table, place.stream));
      check_cuda(cuda::launch_finish_each<Reduction>(args, place.stream));
      slots += of_table * kReduceSlots;
      results += args.batch.count;
    });
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
    std::vector<Layout> layouts(tensors.size());
    std::vector<Bundle> all(tensors.size());
    std::vector<const Bundle*> bundles;
    int64_t threads = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
      all[t] = cuda::bundle_of(tensors[t], layouts[t]);
      bundles.push_back(&all[t]);
      threads += all[t].numel;
    }
    cuda::Batch<cuda::FiberJob<Reduction>> batch{};
    batch.chunk = cuda::chunk_for(threads, place.multiprocessors);
    for_each_table(batch, bundles, place, [&](const auto& args, int64_t chunks) {
      check_cuda(cuda::launch_fibers<Reduction>(args, chunks, place.stream));
    });
  }

  // The vectors of L-BFGS. The task's lists of rows and coefficients are on the host, `out` is on the device; nothing
  // is waited for.
  static void history_dots(at::Device device, const HistoryDots& task, double* out);
  static void history_combine(at::Device device, const HistoryCombination& task, Norms* out);
  static void norms(at::Device device, const NormsOf& task, Norms* out);

 private:
  // Of a tensor, so that the next one is aligned as any vector access asks for.
  static int64_t bytes_for(int64_t numel, Storage storage) { return (numel * bytes_of(storage) + 255) / 256 * 256; }

  template <class V, class Rule>
  static void sweep(cuda::Batch<Rule> batch, const Work& call, const CudaPlace& place) {
    std::vector<const Bundle*> bundles;
    bundles.reserve(call.bundles.size());
    int64_t elements = 0;
    for (size_t i = 0; i < call.bundles.size(); ++i) {
      if (call.bundles[i].in_double != (sizeof(V) == sizeof(double)) ||
          (call.bundles[i].numel == 0 && !rules::kStoresScalars<Rule>))
        continue;
      bundles.push_back(&call.bundles[i]);
      elements += call.bundles[i].numel;
    }
    batch.chunk = cuda::chunk_for(elements, place.multiprocessors);
    batch.averaged = false;
    for (const Bundle* bundle : bundles) batch.averaged |= bundle->average != nullptr;
    for_each_table(batch, bundles, place, [&](const auto& args, int64_t chunks) {
      check_cuda(cuda::launch_sweep<Rule, V>(args, chunks, place.stream));
    });
  }

  // Launches with as few tables as hold all tensors.
  template <class Rule, class Launch>
  static void for_each_table(const cuda::Batch<Rule>& batch, const std::vector<const Bundle*>& bundles,
                             const CudaPlace& place, const Launch& launch) {
    const int64_t room = cuda::Args<Rule, cuda::kArgumentBytes>::kRoom;
    const auto count = static_cast<int64_t>(bundles.size());
    for (int64_t done = 0; done < count;) {
      const Bundle* const* const next = bundles.data() + done;
      auto shape = cuda::fitting<Rule>(next, count - done, room);
      if (shape.count < count - done && !place.capturing) {
        shape = cuda::fitting<Rule>(next, count - done, INT64_MAX);
        launch_remote(batch, next, shape, place, launch);
      } else {
        launch_local(batch, next, shape, launch);
      }
      done += shape.count;
    }
  }

  template <class Rule, class Launch>
  static void launch_local(const cuda::Batch<Rule>& batch, const Bundle* const* bundles,
                           const cuda::TableShape<Rule>& shape, const Launch& launch) {
    cuda::Args<Rule, cuda::kArgumentBytes> args;  // the room that no table fills stays as it is
    args.batch = batch;
    args.batch.count = static_cast<int32_t>(shape.count);
    const int64_t chunks = cuda::fill_table(bundles, shape, batch.chunk, args.room);
    launch(args, chunks);
  }

  template <class Rule, class Launch>
  static void launch_remote(const cuda::Batch<Rule>& batch, const Bundle* const* bundles,
                            const cuda::TableShape<Rule>& shape, const CudaPlace& place, const Launch& launch) {
    CudaTable table(place, shape.bytes());
    cuda::Args<Rule, cuda::kArgumentBytes> args;
    args.batch = batch;
    args.batch.count = static_cast<int32_t>(shape.count);
    const int64_t chunks = cuda::fill_table(bundles, shape, batch.chunk, table.host());
    args.batch.remote = table.send();
    launch(args, chunks);
  }
};

}  // namespace optim_ext::ops
