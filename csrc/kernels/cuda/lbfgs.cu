#include "../../rules/lbfgs.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Flatten)
OPTIM_EXT_INSTANTIATE(Displace<false>)
OPTIM_EXT_INSTANTIATE(Displace<true>)

}  // namespace optim_ext::cuda
