// The one list of rules. Each kernel file instantiates it, so a rule named here exists for every instruction set and
// GPU.
#pragma once

#include "adadelta.h"
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
#include "rprop.h"
#include "sgd.h"
#include "sparse_adam.h"

// clang-format off
#define OPTIM_EXT_FOR_EACH_RULE(X) \
  X(Adadelta)                      \
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
  X(LambMoments)                   \
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


// The reductions, which have one operand and write nothing.
#define OPTIM_EXT_FOR_EACH_REDUCTION(X) \
  X(L1Norm)                             \
  X(L2Norm)                             \
  X(MaxNorm)                            \
  X(NonFinite)
// clang-format on
