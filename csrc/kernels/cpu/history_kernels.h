// The loops of L-BFGS by instruction set.
#pragma once

#include "../history.h"
#include "kernels.h"

namespace optim_ext::cpu {

// The ranges are tiles.
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
