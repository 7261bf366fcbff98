#include "../../rules/lion.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Lion)

}  // namespace optim_ext::cuda
