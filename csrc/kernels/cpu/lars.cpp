#include "../../rules/lars.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Lars>();

}  // namespace optim_ext
