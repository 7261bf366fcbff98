#include "../../rules/adafactor.h"
#include "reducer-inl.h"

namespace optim_ext {

template const cpu::Reduce (&reduce_kernels_of<rules::AdafactorRms<false>>())[cpu::kIsas];
template const cpu::Reduce (&reduce_kernels_of<rules::AdafactorRms<true>>())[cpu::kIsas];

}  // namespace optim_ext
