// The CPU kernels by instruction set. isa_baseline is whatever the compiler targets by default (SSE2 on x86-64, NEON on
// aarch64) and always exists; the others exist on x86-64 and are chosen at run time.
#pragma once

#include "../history.h"
#include "../program.h"

#if defined(OPTIM_EXT_X86_ISAS)  // 0, by who wants the baseline only and a quick build
#elif defined(__x86_64__)
#define OPTIM_EXT_X86_ISAS 1
#else
#define OPTIM_EXT_X86_ISAS 0
#endif

namespace optim_ext::cpu {

// The sweep of a rule whose type is at hand.
template <class Rule, class V>
auto sweep_for(Isa isa) {
  const Sweep sweep = program_of<Rule>().sweep[static_cast<int>(isa)][sizeof(V) == sizeof(double)];
  return [sweep](const Rule& rule, const Bundle& bundle, int64_t begin, int64_t end, const Pass& pass) {
    sweep(&rule, bundle, begin, end, pass);
  };
}

template <class Reduction>
Reduce reduce_for(Isa isa) {
  return reduce_kernels_of<Reduction>()[static_cast<int>(isa)];
}

template <class Reduction>
ReduceFibers reduce_fibers_for(Isa isa) {
  return fiber_kernels_of<Reduction>()[static_cast<int>(isa)];
}

// The loops of L-BFGS; the ranges are tiles.
struct HistoryKernels {
  void (*dots)(const HistoryDots&, int64_t first, int64_t last, double* sums);
  void (*combine)(const HistoryCombination&, int64_t first, int64_t last, Norms* norms);
  void (*norms)(const NormsOf&, int64_t first, int64_t last, Norms* norms);
};

#define OPTIM_EXT_DECLARE_ISA(isa)                                                                 \
  namespace isa {                                                                                  \
  void history_dots(const HistoryDots& task, int64_t first, int64_t last, double* sums);           \
  void history_combine(const HistoryCombination& task, int64_t first, int64_t last, Norms* norms); \
  void norms_of_tiles(const NormsOf& task, int64_t first, int64_t last, Norms* norms);             \
  }
OPTIM_EXT_DECLARE_ISA(isa_baseline)
OPTIM_EXT_DECLARE_ISA(isa_avx2)
OPTIM_EXT_DECLARE_ISA(isa_avx512)
#undef OPTIM_EXT_DECLARE_ISA

inline HistoryKernels history_kernels_for([[maybe_unused]] Isa isa) {
#if OPTIM_EXT_X86_ISAS
  if (isa == Isa::avx512) return {&isa_avx512::history_dots, &isa_avx512::history_combine, &isa_avx512::norms_of_tiles};
  if (isa == Isa::avx2) return {&isa_avx2::history_dots, &isa_avx2::history_combine, &isa_avx2::norms_of_tiles};
#endif
  return {&isa_baseline::history_dots, &isa_baseline::history_combine, &isa_baseline::norms_of_tiles};
}

}  // namespace optim_ext::cpu
