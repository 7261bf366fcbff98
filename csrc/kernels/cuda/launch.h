// The way into the kernels for the torch-facing side: arguments in, an error code out. Nothing here synchronises.
#pragma once

#include <type_traits>

#include "../../device/device.h"
#include "../../rules/norm.h"
#include "table.h"

namespace optim_ext::cuda {

static_assert(kArgumentBytes <= device::kMaxArgumentBytes);

// Launches that many blocks of kThreads.
template <class Kernel, class Arguments>
device::Status launch_blocks(Kernel* kernel, const Arguments& args, int64_t blocks, device::Stream stream) {
  return blocks == 0 ? device::kSuccess : device::launch(kernel, {blocks}, kThreads, stream, args);
}

// Step counters on the device, to be advanced by one before the update that reads them.
template <int64_t kBytes>
struct alignas(8) Counters {
  static constexpr int64_t kRoom = (kBytes - 16) / 8;
  const float* found_inf;  // 1: leave them as they are
  int32_t count;
  int32_t floats;  // the first so many are f32, the others f64
  void* counter[kRoom];
};

// Whether a step by this rule may also average what it has updated.
template <class Rule>
constexpr bool kCanAverage = !std::is_same_v<Rule, rules::Average>;

// One block per chunk. V is the type the rule computes in: float, or double as soon as one operand is stored as f64.
template <class Rule, class V, int64_t kBytes>
device::Status launch_sweep(const Args<Rule, kBytes>& args, int64_t chunks, device::Stream stream);

// A rule without its type: the shape of its arguments, and what launches the kernels that know it.
struct Program {
  RuleShape shape;
  bool stores_scalars;
  // In float, in double. `of`: the kernels, where they are not those of a type.
  device::Status (*sweep[2])(const void* of, const Packed& args, int64_t chunks, device::Stream stream);
  const void* of;
};

template <class Rule>
Program program_of() {
  return {shape_of<Rule>(),
          rules::kStoresScalars<Rule>,
          {[](const void*, const Packed& args, int64_t chunks, device::Stream stream) {
             return launch_sweep<Rule, float>(args.as<Rule>(), chunks, stream);
           },
           [](const void*, const Packed& args, int64_t chunks, device::Stream stream) {
             return launch_sweep<Rule, double>(args.as<Rule>(), chunks, stream);
           }},
          nullptr};
}

// Whether parameters are reduced together with what lies beside them: for the norms of LAMB and LARS, and for
// Adafactor.
template <class Reduction>
constexpr bool kReducesKept =
    std::is_same_v<Reduction, rules::L2Norm> || std::is_same_v<Reduction, rules::RootMeanSquare>;

// One block per chunk of kReduceChunk elements.
template <class Reduction>
struct ReduceJob;
template <class Reduction, int64_t kBytes>
device::Status launch_reduce(const Args<ReduceJob<Reduction>, kBytes>& args, int64_t chunks, device::Stream stream);

// Then, where a result per tensor is wanted, one block for each of them.
template <class Reduction, int64_t kBytes>
device::Status launch_finish_each(const Args<ReduceJob<Reduction>, kBytes>& args, device::Stream stream);

// One block per chunk of the threads that fibers are given.
template <class Reduction>
struct FiberJob;
template <class Reduction, int64_t kBytes>
device::Status launch_fibers(const Args<FiberJob<Reduction>, kBytes>& args, int64_t chunks, device::Stream stream);

// The counters of a table, all of them draws of a RoundingKey.
template <int64_t kBytes>
device::Status launch_advance_draws(const Counters<kBytes>& counters, device::Stream stream);

template <int64_t kBytes>
device::Status launch_advance(const Counters<kBytes>& counters, device::Stream stream);

}  // namespace optim_ext::cuda
