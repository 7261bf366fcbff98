// The loop over tensors on the CPU: one parallel region over the concatenation of all of them.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/cpu/kernels.h"
#include "../kernels/norm_outcome.h"
#include "call.h"
#include "parallel.h"

namespace optim_ext::ops {

// What at::get_cpu_capability() allows (ATEN_CPU_CAPABILITY overrides it), read once.
cpu::Isa current_isa();
const char* isa_name(cpu::Isa isa);

struct CpuDriver {
  // Work is dealt out in tiles. A tensor smaller than one still costs its share of pointer chasing, hence a whole tile.
  static constexpr int64_t kTile = 256;
  static constexpr int64_t kGrain = 64;       // tiles below which waking a second thread costs more than it saves
  static constexpr int64_t kReduceGrain = 4;  // the same in chunks of a reduction

  // Whether two parameters are at the same step, so that a rule made ready for one serves the other.
  template <class Rule>
  static bool same_point(const Bundle& a, const Bundle& b) {
    bool same = a.step == b.step;
    for (int k = 0; k < rules::kScalarsOf<Rule>; ++k) {
      same &= a.scalars[k].value == b.scalars[k].value && a.scalars[k].storage == b.scalars[k].storage;
    }
    return same;
  }

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
      const Bundle* ready_at = nullptr;
      for (; begin < end; ++i) {
        const Bundle& bundle = call.bundles[i];
        if (ready_at == nullptr || !same_point<Rule>(*ready_at, bundle)) ready = ready_for(rule, bundle);
        ready_at = &bundle;
        const int64_t stop = std::min(end, first_tile[i + 1]);
        const int64_t from = (begin - first_tile[i]) * kTile,
                      to = std::min(bundle.numel, (stop - first_tile[i]) * kTile);
        const auto sweep = bundle.in_double ? in_double : in_float;
        if (bundle.average && !averages_in_loop(bundle)) {
          sweep_averaged(sweep, ready, bundle, from, to, call.pass, isa);
        } else if (from < to) {
          sweep(ready, bundle, from, to, call.pass);
        }
        begin = stop;
      }
    };
    in_parallel(first_tile.back(), kGrain, work);
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

  // Runs a rule whose last operand is not in the call: it is computed for its norm alone, and forgotten. Gives, tensor
  // by tensor, the norms of the parameter and of that operand.
  template <class Rule>
  static void run_for_norms(const Rule& rule, const Work& call, double* param_norms, double* last_norms) {
    using rules::L2Norm;
    constexpr int kLast = Rule::kOperands - 1;
    const cpu::Isa isa = current_isa();
    const auto in_float = cpu::sweep_for<Rule, float>(isa), in_double = cpu::sweep_for<Rule, double>(isa);
    const cpu::Reduce reduce = cpu::reduce_for<L2Norm>(isa);
    Slots of_params(call), of_last(call);
    over_tiles(call, of_params, [&](auto& next_tile) {
      alignas(64) double buffer[kReduceTile];
      Rule ready = rule;
      Bundle work{}, last{};
      Layout layout;
      const Bundle* ready_at = nullptr;
      for (Tile tile; next_tile(tile);) {
        if (tile.bundle != ready_at) {
          if (ready_at == nullptr || !same_point<Rule>(*ready_at, *tile.bundle)) ready = ready_for(rule, *tile.bundle);
          ready_at = tile.bundle;
          work = *tile.bundle;
          work.average = nullptr;
          work.storage[kLast] = last.storage[0] = work.in_double ? Storage::f64 : Storage::f32;
          if (work.layout) {
            layout = *work.layout;
            layout.make_dense(kLast);
            work.layout = &layout;
          }
        }
        // Where the operand would begin, were there memory for all of it.
        const int64_t before = tile.begin * bytes_of(work.storage[kLast]);
        work.data[kLast] = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(buffer) - before);
        last.data[0] = buffer;
        (work.in_double ? in_double : in_float)(ready, work, tile.begin, tile.end, call.pass);
        of_params.value[tile.slot] = reduce(work, tile.begin, tile.end);
        of_last.value[tile.slot] = reduce(last, 0, tile.end - tile.begin);
      }
    });
    finish_each<L2Norm>(call, of_params, param_norms);
    finish_each<L2Norm>(call, of_last, last_norms);
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

  // Elements updated before they are averaged, out of the cache: long enough for the hardware to fetch ahead.
  static constexpr int64_t kStretch = 64 * kTile;

  // The update, followed at a short distance by the very sweep that averages parameters on its own.
  template <class Rule>
  static void sweep_averaged(cpu::Sweep<Rule> update, const Rule& rule, const Bundle& bundle, int64_t begin,
                             int64_t end, const Pass& pass, cpu::Isa isa) {
    const auto average = bundle.average->in_double ? cpu::sweep_for<rules::Average, double>(isa)
                                                   : cpu::sweep_for<rules::Average, float>(isa);
    for (int64_t stop; begin < end; begin = stop) {
      stop = std::min(end, begin + kStretch);
      update(rule, bundle, begin, stop, pass);
      average({pass.average_weight}, *bundle.average, begin, stop, Pass{});
    }
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
      for (Tile tile; next_tile(tile);) slots.value[tile.slot] = reduce(*tile.bundle, tile.begin, tile.end);
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
