// The loop over tensors on the CPU: one parallel region over the concatenation of all of them.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "../kernels/cpu/kernels.h"
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
  static constexpr int64_t kGrain = 64;  // tiles below which waking a second thread costs more than it saves

  template <class Rule>
  static void run(const Rule& rule, const Work& call) {
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
    share_out(first_tile.back(), kGrain, work);
  }

  // The vectors of L-BFGS; results are written to `out`.
  static void history_dots(at::Device, const HistoryDots& task, double* out);
  static void history_combine(at::Device, const HistoryCombination& task, Norms* out);
  static void norms(at::Device, const NormsOf& task, Norms* out);

 private:
  // Calls work(begin, end) for parts of [0, tiles) on as many threads as that is worth.
  template <class Work>
  static void share_out(int64_t tiles, int64_t grain, const Work& work) {
    if (in_forked_child()) {
      work(int64_t(0), tiles);
    } else {
      at::parallel_for(0, tiles, grain, work);
    }
  }
};

}  // namespace optim_ext::ops
