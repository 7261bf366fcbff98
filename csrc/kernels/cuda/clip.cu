#include "../../rules/clip.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE_NATIVE(Clip)

}  // namespace optim_ext::cuda
