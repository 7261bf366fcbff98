#include "../../rules/norm.h"
#include "reducer-inl.h"

namespace optim_ext {

template const cpu::Reduce (&reduce_kernels_of<rules::L1Norm>())[cpu::kIsas];
template const cpu::Reduce (&reduce_kernels_of<rules::L2Norm>())[cpu::kIsas];
template const cpu::Reduce (&reduce_kernels_of<rules::MaxNorm>())[cpu::kIsas];
template const cpu::Reduce (&reduce_kernels_of<rules::NonFinite>())[cpu::kIsas];
template const cpu::Reduce (&reduce_kernels_of<rules::RootMeanSquare>())[cpu::kIsas];
template const cpu::ReduceFibers (&fiber_kernels_of<rules::Sum>())[cpu::kIsas];
template const cpu::ReduceFibers (&fiber_kernels_of<rules::SumOfSquares>())[cpu::kIsas];

}  // namespace optim_ext
