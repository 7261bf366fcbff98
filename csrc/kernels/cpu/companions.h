// Sweeps of parameters that have companions, whatever their rule.
#pragma once

#include "kernels.h"

namespace optim_ext::cpu {

// A rule as it stands at a parameter's step, and what its program says of it.
struct ReadyRule {
  Sweep sweep;  // in float
  const void* rule;
  int operands;
  unsigned used, updates;
};

// Applies the rule to elements [begin, end), tile by tile: everything is opened in float, swept, and what the rule
// updates is closed again. No block of that may reach across either end (Companions::end_of_piece).
using SweepCompanions = void (*)(const ReadyRule&, const Bundle&, int64_t begin, int64_t end, const Pass&);

SweepCompanions companions_kernel_for(Isa isa);

// Writes to `to` what elements [begin, end) of a parameter are together with their twin, which it has to have.
using ReadKept = void (*)(const Bundle&, int64_t begin, int64_t end, float* to);

ReadKept read_kept_kernel_for(Isa isa);

}  // namespace optim_ext::cpu
