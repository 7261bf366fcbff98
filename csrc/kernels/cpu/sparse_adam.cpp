#include "../../rules/sparse_adam.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::SparseAdam>();

}  // namespace optim_ext
