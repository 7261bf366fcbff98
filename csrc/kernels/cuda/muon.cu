#include "../../rules/muon.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE_NATIVE(MuonMomentum)
OPTIM_EXT_INSTANTIATE_NATIVE(MuonUpdate)

}  // namespace optim_ext::cuda
