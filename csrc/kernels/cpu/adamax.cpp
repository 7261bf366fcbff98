#include "../../rules/adamax.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Adamax>();

}  // namespace optim_ext
