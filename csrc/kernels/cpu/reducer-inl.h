// The kernels of a reduction for every instruction set, to be instantiated as those of rules are (program-inl.h).
#define OPTIM_EXT_INL "reduce-inl.h"
#include "for_each_isa.h"

namespace optim_ext {

template <class Reduction>
const cpu::Reduce (&reduce_kernels_of()) [cpu::kIsas] {
  using namespace cpu;
  static constexpr Reduce kernels[kIsas] = OPTIM_EXT_OF_EACH_ISA(reduce<Reduction>);
  return kernels;
}

template <class Reduction>
const cpu::ReduceFibers (&fiber_kernels_of()) [cpu::kIsas] {
  using namespace cpu;
  static constexpr ReduceFibers kernels[kIsas] = OPTIM_EXT_OF_EACH_ISA(reduce_fibers<Reduction>);
  return kernels;
}

}  // namespace optim_ext
