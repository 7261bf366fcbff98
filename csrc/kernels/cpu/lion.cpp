#include "../../rules/lion.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Lion>();

}  // namespace optim_ext
