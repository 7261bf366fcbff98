#include "../../rules/adafactor.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::AdafactorAverage<false>>();
template const RuleProgram& program_of<rules::AdafactorAverage<true>>();
template const RuleProgram& program_of<rules::AdafactorFactor<false>>();
template const RuleProgram& program_of<rules::AdafactorFactor<true>>();
template const RuleProgram& program_of<rules::AdafactorUpdate<false>>();
template const RuleProgram& program_of<rules::AdafactorUpdate<true>>();

}  // namespace optim_ext
