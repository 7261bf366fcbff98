#include "../../rules/sgd.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Sgd<false>>();
template const RuleProgram& program_of<rules::Sgd<true>>();

}  // namespace optim_ext
