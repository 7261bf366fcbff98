#include "../../rules/rprop.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Rprop)

}  // namespace optim_ext::cuda
