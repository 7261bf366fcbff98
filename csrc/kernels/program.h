// A rule without its type: what a driver needs to know of it, and the kernels that apply it.
#pragma once

#include "../rules/rule.h"
#include "operand.h"
#include "reduce.h"

namespace optim_ext {

namespace cpu {

enum class Isa { baseline, avx2, avx512 };
constexpr int kIsas = 3;

using Sweep = void (*)(const void* rule, const Bundle&, int64_t begin, int64_t end, const Pass&);
using Reduce = double (*)(const Bundle&, int64_t begin, int64_t end);
using ReduceFibers = void (*)(const Fibers&, int64_t begin, int64_t end);

}  // namespace cpu

constexpr int64_t kMaxRuleBytes = 1024;  // of a rule with everything at_step fills in

struct RuleProgram {
  int64_t bytes;
  int operands;
  unsigned used, updates;
  int scalars;
  bool stores_scalars;
  // Writes the rule as it stands at a step to `ready`; `scalars` become what they are after it.
  void (*at_step)(const void* rule, double step, rules::Scalar* scalars, void* ready);
  cpu::Sweep sweep[cpu::kIsas][2];  // in float, in double
};

// Defined for every rule, in the translation unit of its family: kernels/cpu/<family>.cpp.
template <class Rule>
const RuleProgram& program_of();

// The same for reductions.
template <class Reduction>
const cpu::Reduce (&reduce_kernels_of())[cpu::kIsas];
template <class Reduction>
const cpu::ReduceFibers (&fiber_kernels_of())[cpu::kIsas];

}  // namespace optim_ext
