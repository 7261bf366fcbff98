#include "../../rules/radam.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(RAdam)

}  // namespace optim_ext::cuda
