#include "../../rules/adam.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Adam<false>)
OPTIM_EXT_INSTANTIATE(Adam<true>)

}  // namespace optim_ext::cuda
