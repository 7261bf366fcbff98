#include "../../rules/average.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Average)

}  // namespace optim_ext::cuda
