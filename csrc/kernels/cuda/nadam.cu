#include "../../rules/nadam.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(NAdam)

}  // namespace optim_ext::cuda
