#include "../../rules/adamax.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Adamax)

}  // namespace optim_ext::cuda
