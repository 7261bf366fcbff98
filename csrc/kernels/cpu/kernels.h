// The CPU sweeps by instruction set. isa_baseline is whatever the compiler targets by default (SSE2 on x86-64, NEON on
// aarch64) and always exists; the others exist on x86-64 and are chosen at run time.
#pragma once

#include "../../rules/all_rules.h"
#include "../convert.h"
#include "../history.h"
#include "../operand.h"
#include "../reduce.h"

#if defined(__x86_64__)
#define OPTIM_EXT_X86_ISAS 1
#else
#define OPTIM_EXT_X86_ISAS 0
#endif

namespace optim_ext::cpu {

// std::index_sequence without <utility>: the ISA files must not instantiate library code under their target flags.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <class Rule>
using Sweep = void (*)(const Rule&, const Bundle&, int64_t begin, int64_t end, const Pass&);

using Reduce = double (*)(const Bundle&, int64_t begin, int64_t end);
using ReduceFibers = void (*)(const Fibers&, int64_t begin, int64_t end);

#define OPTIM_EXT_DECLARE_ISA(isa)                                                                  \
  namespace isa {                                                                                   \
  template <class Rule, class V>                                                                    \
  void sweep(const Rule& rule, const Bundle& bundle, int64_t begin, int64_t end, const Pass& pass); \
  template <class Rule>                                                                             \
  double reduce(const Bundle& bundle, int64_t begin, int64_t end);                                  \
  template <class Rule>                                                                             \
  void reduce_fibers(const Fibers& fibers, int64_t begin, int64_t end);                             \
  void history_dots(const HistoryDots& task, int64_t first, int64_t last, double* sums);            \
  void history_combine(const HistoryCombination& task, int64_t first, int64_t last, Norms* norms);  \
  void norms_of_tiles(const NormsOf& task, int64_t first, int64_t last, Norms* norms);              \
  }
OPTIM_EXT_DECLARE_ISA(isa_baseline)
OPTIM_EXT_DECLARE_ISA(isa_avx2)
OPTIM_EXT_DECLARE_ISA(isa_avx512)
#undef OPTIM_EXT_DECLARE_ISA

enum class Isa { baseline, avx2, avx512 };

template <class Rule, class V>
Sweep<Rule> sweep_for(Isa isa) {
#if OPTIM_EXT_X86_ISAS
  if (isa == Isa::avx512) return &isa_avx512::sweep<Rule, V>;
  if (isa == Isa::avx2) return &isa_avx2::sweep<Rule, V>;
#endif
  return &isa_baseline::sweep<Rule, V>;
}

template <class Rule>
Reduce reduce_for(Isa isa) {
#if OPTIM_EXT_X86_ISAS
  if (isa == Isa::avx512) return &isa_avx512::reduce<Rule>;
  if (isa == Isa::avx2) return &isa_avx2::reduce<Rule>;
#endif
  return &isa_baseline::reduce<Rule>;
}

template <class Rule>
ReduceFibers reduce_fibers_for(Isa isa) {
#if OPTIM_EXT_X86_ISAS
  if (isa == Isa::avx512) return &isa_avx512::reduce_fibers<Rule>;
  if (isa == Isa::avx2) return &isa_avx2::reduce_fibers<Rule>;
#endif
  return &isa_baseline::reduce_fibers<Rule>;
}

// The loops of L-BFGS; the ranges are tiles.
struct HistoryKernels {
  void (*dots)(const HistoryDots&, int64_t first, int64_t last, double* sums);
  void (*combine)(const HistoryCombination&, int64_t first, int64_t last, Norms* norms);
  void (*norms)(const NormsOf&, int64_t first, int64_t last, Norms* norms);
};

inline HistoryKernels history_kernels_for(Isa isa) {
#if OPTIM_EXT_X86_ISAS
  if (isa == Isa::avx512) return {&isa_avx512::history_dots, &isa_avx512::history_combine, &isa_avx512::norms_of_tiles};
  if (isa == Isa::avx2) return {&isa_avx2::history_dots, &isa_avx2::history_combine, &isa_avx2::norms_of_tiles};
#endif
  return {&isa_baseline::history_dots, &isa_baseline::history_combine, &isa_baseline::norms_of_tiles};
}

}  // namespace optim_ext::cpu
