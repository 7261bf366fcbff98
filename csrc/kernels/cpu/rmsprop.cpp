#include "../../rules/rmsprop.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::RMSprop<false, false>>();
template const RuleProgram& program_of<rules::RMSprop<false, true>>();
template const RuleProgram& program_of<rules::RMSprop<true, false>>();
template const RuleProgram& program_of<rules::RMSprop<true, true>>();

}  // namespace optim_ext
