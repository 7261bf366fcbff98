#include "../../rules/adadelta.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Adadelta>();

}  // namespace optim_ext
