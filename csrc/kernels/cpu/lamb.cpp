#include "../../rules/lamb.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::LambDirection>();
template const RuleProgram& program_of<rules::LambUpdate>();

}  // namespace optim_ext
