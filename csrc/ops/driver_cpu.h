// The loop over tensors on the CPU: one parallel region over the concatenation of all of them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../kernels/cpu/kernels.h"
#include "../kernels/norm_outcome.h"
#include "call.h"

namespace optim_ext::ops {

// What at::get_cpu_capability() allows (ATEN_CPU_CAPABILITY overrides it), read once.
cpu::Isa current_isa();
const char* isa_name(cpu::Isa isa);

// True in a child of fork(): its parent's OpenMP threads are gone and waiting for them would hang, so it runs on one.
bool in_forked_child();

struct CpuDriver {
  // Work is dealt out in tiles. A tensor smaller than one still costs its share of pointer chasing, hence a whole tile.
  static constexpr int64_t kTile = 256;
  static constexpr int64_t kGrain = 64;       // tiles below which waking a second thread costs more than it saves
  static constexpr int64_t kReduceGrain = 4;  // the same in chunks of a reduction

  template <class Rule>
  static void run(const Rule& rule, const Call& call) {
    std::vector<int64_t> first_tile(call.bundles.size() + 1, 0);
    for (size_t i = 0; i < call.bundles.size(); ++i) {
      first_tile[i + 1] = first_tile[i] + (call.bundles[i].numel + kTile - 1) / kTile;
    }
    const cpu::Isa isa = current_isa();
    const auto in_float = cpu::sweep_for<Rule, float>(isa), in_double = cpu::sweep_for<Rule, double>(isa);
    const auto work = [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(first_tile.begin(), first_tile.end(), begin) - first_tile.begin() - 1;
      Rule ready = rule;
      double ready_for = -1.0;
      for (; begin < end; ++i) {
        const Bundle& bundle = call.bundles[i];
        if (bundle.step != ready_for) ready = rule.at_step(ready_for = bundle.step);
        const int64_t stop = std::min(end, first_tile[i + 1]);
        const int64_t from = (begin - first_tile[i]) * kTile,
                      to = std::min(bundle.numel, (stop - first_tile[i]) * kTile);
        if (from < to) (call.in_double[i] ? in_double : in_float)(ready, bundle, from, to, call.pass);
        begin = stop;
      }
    };
    in_parallel(first_tile.back(), kGrain, work);
  }

  // One result for all tensors of the call.
  template <class Reduction>
  static void reduce_all(const Call& call, const NormOutcome& outcome) {
    const Slots slots = fill_slots<Reduction>(call);
    outcome.write(Reduction::finish(reduce_slots<Reduction>(slots.value.data(), slots.value.size())));
  }

  // One result per tensor.
  template <class Reduction>
  static void reduce_each(const Call& call, double* results) {
    const Slots slots = fill_slots<Reduction>(call);
    for (size_t i = 0; i < call.bundles.size(); ++i) {
      const int64_t begin = slots.first_chunk[i] * kReduceSlots, end = slots.first_chunk[i + 1] * kReduceSlots;
      results[i] = Reduction::finish(reduce_slots<Reduction>(slots.value.data() + begin, end - begin));
    }
  }

 private:
  // What the tiles of all tensors come to (see kernels/reduce.h).
  struct Slots {
    std::vector<int64_t> first_chunk;
    std::vector<double> value;
  };

  template <class Work>
  static void in_parallel(int64_t count, int64_t grain, const Work& work) {
    if (in_forked_child()) {
      work(int64_t{0}, count);
    } else {
      at::parallel_for(0, count, grain, work);
    }
  }

  template <class Reduction>
  static Slots fill_slots(const Call& call) {
    Slots slots;
    slots.first_chunk.resize(call.bundles.size() + 1, 0);
    for (size_t i = 0; i < call.bundles.size(); ++i) {
      slots.first_chunk[i + 1] = slots.first_chunk[i] + reduce_chunks(call.bundles[i].numel);
    }
    slots.value.resize(slots.first_chunk.back() * kReduceSlots, 0.0);
    const cpu::Reduce reduce = cpu::reduce_for<Reduction>(current_isa());
    in_parallel(slots.first_chunk.back(), kReduceGrain, [&](int64_t begin, int64_t end) {
      const auto& first = slots.first_chunk;
      size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
      for (; begin < end; ++begin) {
        while (first[i + 1] <= begin) ++i;
        const int64_t numel = call.bundles[i].numel;
        double* value = slots.value.data() + begin * kReduceSlots;
        const int64_t chunk = (begin - first[i]) * kReduceChunk, chunk_end = std::min(numel, chunk + kReduceChunk);
        for (int64_t from = chunk; from < chunk_end; from += kReduceTile) {
          *value++ = reduce(call.bundles[i], from, std::min(chunk_end, from + kReduceTile));
        }
      }
    });
    return slots;
  }
};

}  // namespace optim_ext::ops
