#include "../../rules/asgd.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::ASGD>();

}  // namespace optim_ext
