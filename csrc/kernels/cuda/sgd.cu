#include "../../rules/sgd.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Sgd<false>)
OPTIM_EXT_INSTANTIATE(Sgd<true>)

}  // namespace optim_ext::cuda
