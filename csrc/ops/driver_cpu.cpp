#include "driver_cpu.h"

#include <ATen/Version.h>
#include <pthread.h>

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
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
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

void CpuDriver::run_for_norms(const RuleProgram& program, const void* rule, const Work& call, double* param_norms,
                              double* last_norms) {
  using rules::L2Norm;
  const int last_operand = program.operands - 1;
  const cpu::Isa isa = current_isa();
  const cpu::Reduce reduce = cpu::reduce_for<L2Norm>(isa);
  Slots of_params(call), of_last(call);
  over_tiles(call, of_params, [&](auto& next_tile) {
    alignas(64) double buffer[kReduceTile];
    alignas(double) unsigned char ready[kMaxRuleBytes];
    Bundle work{}, last{};
    Layout layout;
    const Bundle* ready_at = nullptr;
    for (Tile tile; next_tile(tile);) {
      if (tile.bundle != ready_at) {
        if (ready_at == nullptr || !same_point(program.scalars, *ready_at, *tile.bundle))
          make_ready(program, rule, *tile.bundle, ready);
        ready_at = tile.bundle;
        work = *tile.bundle;
        work.average = nullptr;
        work.storage[last_operand] = last.storage[0] = work.in_double ? Storage::f64 : Storage::f32;
        if (work.layout) {
          layout = *work.layout;
          layout.make_dense(last_operand);
          work.layout = &layout;
        }
      }
      // Where the operand would begin, were there memory for all of it.
      const int64_t before = tile.begin * bytes_of(work.storage[last_operand]);
      work.data[last_operand] = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(buffer) - before);
      last.data[0] = buffer;
      sweep_of(program, isa, work.in_double)(ready, work, tile.begin, tile.end, call.pass);
      of_params.value[tile.slot] = reduce(work, tile.begin, tile.end);
      of_last.value[tile.slot] = reduce(last, 0, tile.end - tile.begin);
    }
  });
  finish_each<L2Norm>(call, of_params, param_norms);
  finish_each<L2Norm>(call, of_last, last_norms);
}

void CpuDriver::history_dots(at::Device, const HistoryDots& task, double* out) {
  const int64_t tiles = history_tiles(task.numel);
  std::vector<double> sums(static_cast<size_t>(tiles * task.sums()));
  const auto dots = cpu::history_kernels_for(current_isa()).dots;
  in_parallel(tiles, tiles_per_thread(2 * task.history.count),
              [&](int64_t begin, int64_t end) { dots(task, begin, end, sums.data()); });
  total(sums.data(), tiles, task.sums(), out);
}

void CpuDriver::history_combine(at::Device, const HistoryCombination& task, Norms* out) {
  const int64_t tiles = history_tiles(task.numel);
  std::vector<Norms> norms(static_cast<size_t>(tiles));
  const auto combine = cpu::history_kernels_for(current_isa()).combine;
  in_parallel(tiles, tiles_per_thread(2 * task.history.count),
              [&](int64_t begin, int64_t end) { combine(task, begin, end, norms.data()); });
  *out = total(norms.data(), tiles);
}

void CpuDriver::norms(at::Device, const NormsOf& task, Norms* out) {
  const int64_t tiles = history_tiles(task.numel);
  std::vector<Norms> norms(static_cast<size_t>(tiles));
  const auto of_tiles = cpu::history_kernels_for(current_isa()).norms;
  in_parallel(tiles, tiles_per_thread(1),
              [&](int64_t begin, int64_t end) { of_tiles(task, begin, end, norms.data()); });
  *out = total(norms.data(), tiles);
}

}  // namespace optim_ext::ops
