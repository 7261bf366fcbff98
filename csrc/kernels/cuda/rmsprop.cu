#include "../../rules/rmsprop.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(RMSprop<false, false>)
OPTIM_EXT_INSTANTIATE(RMSprop<false, true>)
OPTIM_EXT_INSTANTIATE(RMSprop<true, false>)
OPTIM_EXT_INSTANTIATE(RMSprop<true, true>)

}  // namespace optim_ext::cuda
