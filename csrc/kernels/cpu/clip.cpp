#include "../../rules/clip.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::Clip>();

}  // namespace optim_ext
