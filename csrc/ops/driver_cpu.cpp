#include "driver_cpu.h"

#include <ATen/Version.h>
#include <pthread.h>

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

}  // namespace

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
