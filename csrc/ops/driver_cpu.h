// The loop over tensors on the CPU: one parallel region over the concatenation of all of them.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "../kernels/cpu/kernels.h"
#include "../kernels/norm_outcome.h"
#include "../rules/norm.h"
#include "../call/call.h"
#include "../call/parallel.h"

namespace optim_ext {
struct HistoryDots;
struct HistoryCombination;
struct Norms;
struct NormsOf;
}  // namespace optim_ext

namespace optim_ext::ops {

// What at::get_cpu_capability() allows (ATEN_CPU_CAPABILITY overrides it), read once.
cpu::Isa current_isa();
const char* isa_name(cpu::Isa isa);

// What elements [begin, end) of a tensor, a tile of a reduction, come to: of a parameter that something lies beside
// what the two are together.
double reduce_kept(cpu::Reduce reduce, const Bundle& bundle, int64_t begin, int64_t end);

struct CpuDriver {
  // Work is dealt out in tiles. A tensor smaller than one still costs its share of pointer chasing, hence a whole tile.
  static constexpr int64_t kTile = 256;
  static constexpr int64_t kGrain = 64;       // tiles below which waking a second thread costs more than it saves
  static constexpr int64_t kReduceGrain = 4;  // the same in chunks of a reduction

  // All of them in one parallel region; their memory is disjoint.
  static void run(const std::vector<Sweep>& sweeps);
  template <class Rule>
  static void run(const Rule& rule, const Work& call) {
    run({Sweep(program_of<Rule>(), &rule, call.bundles, call.pass)});
  }

  // The vectors of L-BFGS; results are written to `out`.
  static void history_dots(at::Device, const HistoryDots& task, double* out);
  static void history_combine(at::Device, const HistoryCombination& task, Norms* out);
  static void norms(at::Device, const NormsOf& task, Norms* out);

  // One result for all tensors of the call.
  template <class Reduction>
  static void reduce_all(const Work& call, const NormOutcome& outcome) {
    const Slots slots = fill_slots<Reduction>(call);
    double count = 0.0;
    for (const Bundle& bundle : call.bundles) count += static_cast<double>(bundle.numel);
    outcome.write(Reduction::finish(reduce_slots<Reduction>(slots.value.data(), slots.value.size()), count));
  }

  // One result per tensor.
  template <class Reduction>
  static void reduce_each(const Work& call, double* results) {
    finish_each<Reduction>(call, fill_slots<Reduction>(call), results);
  }

  // A norm, or a root mean square, to be had of each tensor: of an operand as it is in memory, or of one that is not in
  // the call.
  struct Norm {
    int operand;
    bool is_mean;
    double* results;
  };
  static constexpr size_t kMostNorms = kMaxScalars;

  // Takes norms, at most kMostNorms. The operands that `program` updates are not in the call: they are computed for
  // their norms alone, and forgotten. Null: there are none.
  static void run_for_norms(const RuleProgram* program, const void* rule, const Work& call,
                            std::span<const Norm> norms);
  // Those of the parameter and of the last operand of a rule, which is not in the call.
  template <class Rule>
  static void run_for_norms(const Rule& rule, const Work& call, double* param_norms, double* last_norms) {
    run_for_norms(&program_of<Rule>(), &rule, call,
                  std::array{Norm{0, false, param_norms}, Norm{Rule::kOperands - 1, false, last_norms}});
  }

  // The pieces of all fibers.
  template <class Reduction>
  static void reduce_fibers(at::Device, const std::vector<Fibers>& tensors) {
    std::vector<int64_t> first(tensors.size() + 1, 0);  // in elements; a unit is done by who has its first one
    for (size_t t = 0; t < tensors.size(); ++t) {
      first[t + 1] = first[t] + tensors[t].units() * elements_of_unit(tensors[t]);
    }
    const cpu::ReduceFibers reduce = cpu::reduce_fibers_for<Reduction>(current_isa());
    in_parallel(first.back(), kReduceGrain * kReduceChunk, [&](int64_t begin, int64_t end) {
      for (size_t t = 0; t < tensors.size(); ++t) {
        const int64_t size = elements_of_unit(tensors[t]);
        const auto unit_from = [&](int64_t at) {
          return (std::clamp(at, first[t], first[t + 1]) - first[t] + size - 1) / size;
        };
        if (unit_from(begin) < unit_from(end)) reduce(tensors[t], unit_from(begin), unit_from(end));
      }
    });
  }

 private:
  static int64_t elements_of_unit(const Fibers& fibers) {
    return std::min(fibers.along, kFiberPiece) * std::min(fibers.inner, kFiberWidth);
  }

  // What the tiles of all tensors come to (see kernels/reduce.h).
  struct Slots {
    explicit Slots(const Work& call) : first_chunk(call.bundles.size() + 1, 0) {
      for (size_t i = 0; i < call.bundles.size(); ++i) {
        first_chunk[i + 1] = first_chunk[i] + reduce_chunks(call.bundles[i].numel);
      }
      value.resize(first_chunk.back() * kReduceSlots, 0.0);
    }
    std::vector<int64_t> first_chunk;
    std::vector<double> value;
  };

  // Elements [begin, end) of a tensor, and the number of their slot.
  struct Tile {
    const Bundle* bundle;
    int64_t begin, end, slot;
  };

  // Calls work(next_tile) on every thread; next_tile(tile) gives it one of its tiles after the other, until it is
  // false.
  template <class WorkOnTiles>
  static void over_tiles(const Work& call, const Slots& slots, const WorkOnTiles& work) {
    const auto& first = slots.first_chunk;
    in_parallel(first.back(), kReduceGrain, [&](int64_t chunk, int64_t end) {
      size_t i = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
      int64_t in_chunk = 0;  // tiles
      auto next_tile = [&](Tile& tile) {
        if (chunk == end) return false;
        while (first[i + 1] <= chunk) ++i;
        const Bundle& bundle = call.bundles[i];
        const int64_t begin = (chunk - first[i]) * kReduceChunk + in_chunk * kReduceTile;
        tile = {&bundle, begin, std::min(bundle.numel, begin + kReduceTile), chunk * kReduceSlots + in_chunk};
        if (++in_chunk == kReduceSlots || tile.end == bundle.numel) {
          in_chunk = 0;
          ++chunk;
        }
        return true;
      };
      work(next_tile);
    });
  }

  template <class Reduction>
  static Slots fill_slots(const Work& call) {
    Slots slots(call);
    const cpu::Reduce reduce = cpu::reduce_for<Reduction>(current_isa());
    over_tiles(call, slots, [&](auto& next_tile) {
      for (Tile tile; next_tile(tile);)
        slots.value[tile.slot] = reduce_kept(reduce, *tile.bundle, tile.begin, tile.end);
    });
    return slots;
  }

  template <class Reduction>
  static void finish_each(const Work& call, const Slots& slots, double* results) {
    for (size_t i = 0; i < call.bundles.size(); ++i) {
      const int64_t begin = slots.first_chunk[i] * kReduceSlots, end = slots.first_chunk[i + 1] * kReduceSlots;
      results[i] = Reduction::finish(reduce_slots<Reduction>(slots.value.data() + begin, end - begin),
                                     static_cast<double>(call.bundles[i].numel));
    }
  }
};

}  // namespace optim_ext::ops
