// The program of a rule, with its sweeps for every instruction set. Each family of rules is a translation unit that
// includes its header and this file and instantiates program_of() for its rules: to change a rule recompiles its own
// family only.
#include "../at_step.h"

#define OPTIM_EXT_INL "sweep-inl.h"
#include "for_each_isa.h"

namespace optim_ext {

template <class Rule>
const RuleProgram& program_of() {
  static_assert(sizeof(Rule) <= kMaxRuleBytes && Rule::kOperands <= kMaxOperands);
  static_assert(rules::kScalarsOf<Rule> <= kMaxScalars);
  using namespace cpu;
  static constexpr Sweep in_float[] = OPTIM_EXT_OF_EACH_ISA(sweep<Rule, float>),
                         in_double[] = OPTIM_EXT_OF_EACH_ISA(sweep<Rule, double>);
  static constexpr RuleProgram program{
      sizeof(Rule),
      Rule::kOperands,
      Rule::kUsed,
      Rule::kUpdates,
      rules::kScalarsOf<Rule>,
      rules::kStoresScalars<Rule>,
      &at_step_of<Rule>,
      {{in_float[0], in_double[0]}, {in_float[1], in_double[1]}, {in_float[2], in_double[2]}}};
  return program;
}

}  // namespace optim_ext
