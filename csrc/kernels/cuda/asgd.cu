#include "../../rules/asgd.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(ASGD)

}  // namespace optim_ext::cuda
