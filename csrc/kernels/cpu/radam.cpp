#include "../../rules/radam.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::RAdam>();

}  // namespace optim_ext
