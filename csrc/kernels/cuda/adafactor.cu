#include "../../rules/adafactor.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE(AdafactorAverage<false>)
OPTIM_EXT_INSTANTIATE(AdafactorAverage<true>)
OPTIM_EXT_INSTANTIATE(AdafactorFactor<false>)
OPTIM_EXT_INSTANTIATE(AdafactorFactor<true>)
OPTIM_EXT_INSTANTIATE(AdafactorUpdate<false>)
OPTIM_EXT_INSTANTIATE(AdafactorUpdate<true>)

}  // namespace optim_ext::cuda
