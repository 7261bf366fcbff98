// The one list of rules. Each kernel file instantiates it, so a rule named here exists for every instruction set and
// GPU.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "lbfgs.h"
#include "rmsprop.h"
#include "sgd.h"

// clang-format off
#define OPTIM_EXT_FOR_EACH_RULE(X) \
  X(Adagrad)                       \
  X(Adam<false>)                   \
  X(Adam<true>)                    \
  X(Displace<false>)               \
  X(Displace<true>)                \
  X(Flatten)                       \
  X(RMSprop<false, false>)         \
  X(RMSprop<false, true>)          \
  X(RMSprop<true, false>)          \
  X(RMSprop<true, true>)           \
  X(Sgd<false>)                    \
  X(Sgd<true>)
// clang-format on
