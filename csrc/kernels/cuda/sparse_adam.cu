#include "../../rules/sparse_adam.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(SparseAdam)

}  // namespace optim_ext::cuda
