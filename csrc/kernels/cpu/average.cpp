#include "../../rules/average.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Average>();

}  // namespace optim_ext
