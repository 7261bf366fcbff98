#include "../../rules/rprop.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Rprop>();

}  // namespace optim_ext
