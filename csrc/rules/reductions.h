// All reductions.
#pragma once

#include "adafactor.h"
#include "norm.h"

// clang-format off
#define OPTIM_EXT_FOR_EACH_REDUCTION(X) \
  X(AdafactorRms<false>)                \
  X(AdafactorRms<true>)                 \
  X(L1Norm)                             \
  X(L2Norm)                             \
  X(MaxNorm)                            \
  X(NonFinite)                          \
  X(RootMeanSquare)

// Those that are also taken along one dimension of a tensor: the sum of squares, and the sum.
#define OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(X) \
  X(Sum)                                      \
  X(SumOfSquares)
// clang-format on
