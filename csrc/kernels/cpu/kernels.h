// The CPU kernels by instruction set. isa_baseline is whatever the compiler targets by default (SSE2 on x86-64, NEON on
// aarch64) and always exists; the others exist on x86-64 and are chosen at run time.
#pragma once

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

}  // namespace optim_ext::cpu
