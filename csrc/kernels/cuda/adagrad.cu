#include "../../rules/adagrad.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(Adagrad)

}  // namespace optim_ext::cuda
