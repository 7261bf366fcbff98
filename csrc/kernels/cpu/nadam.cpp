#include "../../rules/nadam.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::NAdam>();

}  // namespace optim_ext
