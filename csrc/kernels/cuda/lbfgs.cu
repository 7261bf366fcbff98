#include "../../rules/lbfgs.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE_NATIVE(Flatten)
OPTIM_EXT_INSTANTIATE_NATIVE(Displace<false>)
OPTIM_EXT_INSTANTIATE_NATIVE(Displace<true>)

}  // namespace optim_ext::cuda
