#include "../../rules/adam.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Adam<false>>();
template const RuleProgram& program_of<rules::Adam<true>>();

}  // namespace optim_ext
