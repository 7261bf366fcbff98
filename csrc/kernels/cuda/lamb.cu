#include "../../rules/lamb.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(LambDirection)
OPTIM_EXT_INSTANTIATE(LambUpdate)

}  // namespace optim_ext::cuda
