#include "../../rules/muon.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(MuonMomentum)
OPTIM_EXT_INSTANTIATE(MuonUpdate)

}  // namespace optim_ext::cuda
