#include "../../rules/average.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE_NATIVE(Average)

}  // namespace optim_ext::cuda
