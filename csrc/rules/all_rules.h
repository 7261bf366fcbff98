// All rules, for tests of what every one of them has to satisfy. The library itself has no such list: each family has a
// file of kernels.
#pragma once

#include "adadelta.h"
#include "adafactor.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "asgd.h"
#include "average.h"
#include "clip.h"
#include "lamb.h"
#include "lars.h"
#include "lbfgs.h"
#include "lion.h"
#include "muon.h"
#include "nadam.h"
#include "norm.h"
#include "radam.h"
#include "rmsprop.h"
#include "reductions.h"
#include "rprop.h"
#include "sgd.h"
#include "sparse_adam.h"

// clang-format off
#define OPTIM_EXT_FOR_EACH_RULE(X) \
  X(Adadelta)                      \
  X(AdafactorAverage<false>)       \
  X(AdafactorAverage<true>)        \
  X(AdafactorFactor<false>)        \
  X(AdafactorFactor<true>)         \
  X(AdafactorUpdate<false>)        \
  X(AdafactorUpdate<true>)         \
  X(Adagrad)                       \
  X(Adam<false>)                   \
  X(Adam<true>)                    \
  X(Adamax)                        \
  X(ASGD)                          \
  X(Average)                       \
  X(Clip)                          \
  X(Displace<false>)               \
  X(Displace<true>)                \
  X(Flatten)                       \
  X(LambDirection)                 \
  X(LambUpdate)                    \
  X(Lars)                          \
  X(Lion)                          \
  X(MuonMomentum)                  \
  X(MuonUpdate)                    \
  X(NAdam)                         \
  X(RAdam)                         \
  X(RMSprop<false, false>)         \
  X(RMSprop<false, true>)          \
  X(RMSprop<true, false>)          \
  X(RMSprop<true, true>)           \
  X(Rprop)                         \
  X(Sgd<false>)                    \
  X(Sgd<true>)                     \
  X(SparseAdam)
// clang-format on
