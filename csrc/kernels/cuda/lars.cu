#include "../../rules/lars.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Lars)

}  // namespace optim_ext::cuda
