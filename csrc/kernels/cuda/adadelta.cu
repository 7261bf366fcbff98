#include "../../rules/adadelta.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Adadelta)

}  // namespace optim_ext::cuda
