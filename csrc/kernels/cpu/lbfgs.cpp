#include "../../rules/lbfgs.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Flatten>();
template const RuleProgram& program_of<rules::Displace<false>>();
template const RuleProgram& program_of<rules::Displace<true>>();

}  // namespace optim_ext
