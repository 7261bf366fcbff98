#include "../../rules/adafactor.h"
#include "sweep-inl.h"

namespace optim_ext::cuda {

OPTIM_EXT_INSTANTIATE_NATIVE(AdafactorAverage<false>)
OPTIM_EXT_INSTANTIATE_NATIVE(AdafactorAverage<true>)
OPTIM_EXT_INSTANTIATE_NATIVE(AdafactorFactor<false>)
OPTIM_EXT_INSTANTIATE_NATIVE(AdafactorFactor<true>)
OPTIM_EXT_INSTANTIATE(AdafactorUpdate<false>)
OPTIM_EXT_INSTANTIATE(AdafactorUpdate<true>)

}  // namespace optim_ext::cuda
