// The one list of rules. Each kernel file instantiates it, so a rule named here exists for every instruction set and
// GPU.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "clip.h"
#include "norm.h"
#include "rmsprop.h"
#include "sgd.h"

// clang-format off
#define OPTIM_EXT_FOR_EACH_RULE(X) \
  X(Adagrad)                       \
  X(Adam<false>)                   \
  X(Adam<true>)                    \
  X(Clip)                          \
  X(RMSprop<false, false>)         \
  X(RMSprop<false, true>)          \
  X(RMSprop<true, false>)          \
  X(RMSprop<true, true>)           \
  X(Sgd<false>)                    \
  X(Sgd<true>)

// The reductions, which have one operand and write nothing.
#define OPTIM_EXT_FOR_EACH_REDUCTION(X) \
  X(L1Norm)                             \
  X(L2Norm)                             \
  X(MaxNorm)                            \
  X(NonFinite)
// clang-format on
