#include "driver_cpu.h"

#include <ATen/Version.h>
#include <pthread.h>

#include <bit>

#include "../kernels/cpu/history_kernels.h"
#include "../kernels/cpu/companions.h"

namespace optim_ext::ops {

cpu::Isa current_isa() {
  static const cpu::Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
    if (!OPTIM_EXT_X86_ISAS) return cpu::Isa::baseline;
    if (capability == "AVX512") return cpu::Isa::avx512;
    if (capability == "AVX2") return cpu::Isa::avx2;
    return cpu::Isa::baseline;
  }();
  return isa;
}

const char* isa_name(cpu::Isa isa) {
  return isa == cpu::Isa::avx512 ? "avx512" : isa == cpu::Isa::avx2 ? "avx2" : "baseline";
}

namespace {
bool forked = false;
[[maybe_unused]] const int registered_at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

bool in_forked_child() { return forked; }

namespace {

// Tiles of a history below which a second thread is not worth waking: the more rows, the more work a tile is.
int64_t tiles_per_thread(int64_t rows) { return std::max<int64_t>(1, 64 / (1 + rows)); }

// Elements updated before they are averaged, out of the cache: long enough for the hardware to fetch ahead.
constexpr int64_t kStretch = 64 * CpuDriver::kTile;

cpu::Sweep sweep_of(const RuleProgram& program, cpu::Isa isa, bool in_double) {
  return program.sweep[static_cast<int>(isa)][in_double];
}

// The update of one piece of a parameter, by the sweep of its rule.
void update(const RuleProgram& program, const void* rule, const Bundle& bundle, int64_t begin, int64_t end,
            const Pass& pass, cpu::Isa isa) {
  const cpu::Sweep sweep = sweep_of(program, isa, bundle.in_double);
  if (bundle.companions == nullptr) return sweep(rule, bundle, begin, end, pass);
  cpu::companions_kernel_for(isa)({sweep, rule, program.operands, program.used, program.updates}, bundle, begin, end,
                                  pass);
}

// The update, followed at a short distance by the very sweep that averages parameters on its own.
void sweep_averaged(const RuleProgram& program, const void* rule, const Bundle& bundle, int64_t begin, int64_t end,
                    const Pass& pass, cpu::Isa isa) {
  const cpu::Sweep average = sweep_of(program_of<rules::Average>(), isa, bundle.average->in_double);
  const rules::Average average_rule{pass.average_weight};
  for (int64_t stop; begin < end; begin = stop) {
    stop = std::min(end, begin + kStretch);
    if (bundle.companions) stop = bundle.companions->end_of_piece(stop);
    update(program, rule, bundle, begin, stop, pass, isa);
    average(&average_rule, *bundle.average, begin, stop, Pass{});
  }
}

// The tiles from `begin` to `end` of one sweep, the first of them in bundle `i`. Moves `begin` on to what is left.
void run_tiles(const Sweep& what, const int64_t* first_tile, size_t i, int64_t& begin, int64_t end, cpu::Isa isa) {
  const RuleProgram& program = *what.program;
  constexpr int64_t kTile = CpuDriver::kTile;
  alignas(double) unsigned char ready[kMaxRuleBytes];
  const Bundle* ready_at = nullptr;
  for (; begin < end && i < what.bundles->size(); ++i) {
    const Bundle& bundle = (*what.bundles)[i];
    if (ready_at == nullptr || !same_point(program.scalars, *ready_at, bundle))
      make_ready(program, what.rule, bundle, ready);
    ready_at = &bundle;
    const int64_t stop = std::min(end, first_tile[i + 1]);
    int64_t from = (begin - first_tile[i]) * kTile, to = std::min(bundle.numel, (stop - first_tile[i]) * kTile);
    if (bundle.companions) {
      from = bundle.companions->end_of_piece(from);
      to = bundle.companions->end_of_piece(to);
    }
    if (bundle.average && (bundle.companions || !averages_in_loop(bundle))) {
      sweep_averaged(program, ready, bundle, from, to, what.pass, isa);
    } else if (from < to) {
      update(program, ready, bundle, from, to, what.pass, isa);
    }
    begin = stop;
  }
}

}  // namespace

double reduce_kept(cpu::Reduce reduce, const Bundle& bundle, int64_t begin, int64_t end) {
  if (bundle.companions == nullptr || bundle.companions->precision == Precision::native)
    return reduce(bundle, begin, end);
  alignas(64) float opened[kReduceTile];
  cpu::read_kept_kernel_for(current_isa())(bundle, begin, end, opened);
  Bundle values{};
  values.data[0] = opened;
  values.storage[0] = Storage::f32;
  values.numel = end - begin;
  return reduce(values, 0, end - begin);
}

void CpuDriver::run(const std::vector<Sweep>& sweeps) {
  std::vector<size_t> first_bundle;       // of each sweep, among those of all
  std::vector<int64_t> first_tile(1, 0);  // of each bundle
  for (const Sweep& sweep : sweeps) {
    first_bundle.push_back(first_tile.size() - 1);
    for (const Bundle& bundle : *sweep.bundles)
      first_tile.push_back(first_tile.back() + (bundle.numel + kTile - 1) / kTile);
  }
  const cpu::Isa isa = current_isa();
  const auto work = [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_tile.begin(), first_tile.end(), begin) - first_tile.begin() - 1;
    size_t s = std::upper_bound(first_bundle.begin(), first_bundle.end(), i) - first_bundle.begin() - 1;
    while (begin < end) {
      run_tiles(sweeps[s], first_tile.data() + first_bundle[s], i - first_bundle[s], begin, end, isa);
      i = ++s < sweeps.size() ? first_bundle[s] : i;
    }
  };
  in_parallel(first_tile.back(), kGrain, work);
}

namespace {

// What norms are taken of, tile by tile, by one thread.
class NormTiles {
 public:
  NormTiles(const RuleProgram* program, const void* rule, const Pass& pass, std::span<const CpuDriver::Norm> norms)
      : program_(program), rule_(rule), pass_(pass), norms_(norms) {}

  // Gives take(k, sum) what elements [begin, end) add to the sum of norm k. `bundle` is that of the call.
  template <class Take>
  void measure(const Bundle& bundle, int64_t begin, int64_t end, const Take& take) {
    if (&bundle != at_) use(bundle);
    // Gradients count as they are, before the sweep that may unscale them. Parameters are in the cache after it:
    // reading them first, and nothing beside them, would wait for memory.
    for (size_t k = 0; k < norms_.size(); ++k) {
      if (!is_made(k) && !is_of_parameter(k)) take(k, reduce_kept(reduce_, *of_[k], begin, end));
    }
    if (program_ != nullptr) make(begin, end);
    for (size_t k = 0; k < norms_.size(); ++k) {
      if (is_made(k)) {
        take(k, reduce_(*of_[k], 0, end - begin));
      } else if (is_of_parameter(k)) {
        take(k, reduce_kept(reduce_, *of_[k], begin, end));
      }
    }
  }

 private:
  bool is_made(size_t k) const { return program_ != nullptr && ((program_->updates >> norms_[k].operand) & 1u) != 0; }
  bool is_of_parameter(size_t k) const { return norms_[k].operand == 0; }
  // The memory of an operand that is made: several norms may be of one.
  double* memory_of(int operand) { return made_[std::popcount(program_->updates & ((1u << operand) - 1u))]; }

  void make(int64_t begin, int64_t end) {
    for (size_t k = 0; k < norms_.size(); ++k) {
      if (!is_made(k)) continue;
      const int operand = norms_[k].operand;
      // Where the operand would begin, were there memory for all of it.
      const int64_t before = begin * bytes_of(work_.storage[operand]);
      work_.data[operand] = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory_of(operand)) - before);
    }
    update(*program_, ready_, work_, begin, end, pass_, isa_);
  }

  void use(const Bundle& bundle) {
    if (program_ != nullptr) {
      if (at_ == nullptr || !same_point(program_->scalars, *at_, bundle)) make_ready(*program_, rule_, bundle, ready_);
      work_ = bundle;
      work_.average = nullptr;
      if (bundle.layout) layout_ = *bundle.layout;
      work_.layout = bundle.layout ? &layout_ : nullptr;
    }
    at_ = &bundle;
    for (size_t k = 0; k < norms_.size(); ++k) {
      const int operand = norms_[k].operand;
      of_[k] = operand == 0 ? &bundle : &parts_[k];
      if (is_made(k)) {
        parts_[k].data[0] = memory_of(operand);
        work_.storage[operand] = parts_[k].storage[0] = bundle.in_double ? Storage::f64 : Storage::f32;
        if (bundle.layout) layout_.make_dense(operand);
      } else if (operand != 0) {
        parts_[k] = one_operand(bundle, operand, layouts_[k]);
      }
    }
  }

  alignas(64) double made_[CpuDriver::kMostNorms][kReduceTile];
  alignas(double) unsigned char ready_[kMaxRuleBytes];
  const RuleProgram* const program_;
  const void* const rule_;
  const Pass& pass_;
  const std::span<const CpuDriver::Norm> norms_;
  const cpu::Isa isa_ = current_isa();
  const cpu::Reduce reduce_ = cpu::reduce_for<rules::L2Norm>(isa_);
  const Bundle* at_ = nullptr;
  Bundle work_{}, parts_[CpuDriver::kMostNorms] = {};
  const Bundle* of_[CpuDriver::kMostNorms] = {};  // one operand each
  Layout layout_, layouts_[CpuDriver::kMostNorms];
};

}  // namespace

void CpuDriver::run_for_norms(const RuleProgram* program, const void* rule, const Work& call,
                              std::span<const Norm> norms) {
  std::vector<Slots> slots(norms.size(), Slots(call));
  over_tiles(call, slots[0], [&](auto& next_tile) {
    NormTiles tiles(program, rule, call.pass, norms);
    for (Tile tile; next_tile(tile);)
      tiles.measure(*tile.bundle, tile.begin, tile.end, [&](size_t k, double sum) { slots[k].value[tile.slot] = sum; });
  });
  for (size_t k = 0; k < norms.size(); ++k) {
    if (norms[k].is_mean) {
      finish_each<rules::RootMeanSquare>(call, slots[k], norms[k].results);
    } else {
      finish_each<rules::L2Norm>(call, slots[k], norms[k].results);
    }
  }
}

void CpuDriver::history_dots(at::Device, const HistoryDots& task, double* out) {
  const int64_t tiles = history_tiles(task.numel);
  std::vector<double> sums(static_cast<size_t>(tiles * task.sums()));
  const auto dots = cpu::history_kernels_for(current_isa()).dots;
  in_parallel(tiles, tiles_per_thread(2 * task.history.count),
              [&](int64_t begin, int64_t end) { dots(task, begin, end, sums.data()); });
  total(sums.data(), history_tiles(task.counted), task.sums(), out);
}

void CpuDriver::history_combine(at::Device, const HistoryCombination& task, Norms* out) {
  const int64_t tiles = history_tiles(task.numel);
  std::vector<Norms> norms(static_cast<size_t>(tiles));
  const auto combine = cpu::history_kernels_for(current_isa()).combine;
  in_parallel(tiles, tiles_per_thread(2 * task.history.count),
              [&](int64_t begin, int64_t end) { combine(task, begin, end, norms.data()); });
  *out = total(norms.data(), history_tiles(task.counted));
}

void CpuDriver::norms(at::Device, const NormsOf& task, Norms* out) {
  const int64_t tiles = history_tiles(task.counted);
  std::vector<Norms> norms(static_cast<size_t>(tiles));
  const auto of_tiles = cpu::history_kernels_for(current_isa()).norms;
  in_parallel(tiles, tiles_per_thread(1),
              [&](int64_t begin, int64_t end) { of_tiles(task, begin, end, norms.data()); });
  *out = total(norms.data(), tiles);
}

}  // namespace optim_ext::ops
