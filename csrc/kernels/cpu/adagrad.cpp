#include "../../rules/adagrad.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Adagrad>();

}  // namespace optim_ext
