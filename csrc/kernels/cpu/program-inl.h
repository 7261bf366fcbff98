// The program of a rule, with its sweeps for every instruction set. Each family of rules is a translation unit that
// includes its header and this file and instantiates program_of() for its rules: to change a rule recompiles its own
// family only.
#include "../program_without_kernels.h"

#define OPTIM_EXT_INL "sweep-inl.h"
#include "for_each_isa.h"

namespace optim_ext {

template <class Rule>
const RuleProgram& program_of() {
  using namespace cpu;
  static constexpr Sweep in_float[] = OPTIM_EXT_OF_EACH_ISA(sweep<Rule, float>),
                         in_double[] = OPTIM_EXT_OF_EACH_ISA(sweep<Rule, double>);
  static constexpr RuleProgram program = [] {
    RuleProgram made = program_without_kernels<Rule>();
    for (int isa = 0; isa < kIsas; ++isa) {
      made.sweep[isa][0] = in_float[isa];
      made.sweep[isa][1] = in_double[isa];
    }
    return made;
  }();
  return program;
}

}  // namespace optim_ext
