// A rule that was compiled apart from this library. No header of the standard library: that would cost every such unit
// a third of its time.
#pragma once

#include "program.h"

namespace optim_ext {

// What the library that holds one exports, as optim_ext_rule(). All sizes have to be those of the reader.
struct CompiledRule {
  static constexpr int32_t kAbi = 1;
  int32_t abi;
  int32_t bundle_bytes, pass_bytes, layout_bytes, program_bytes;
  const RuleProgram* program;  // without sweeps for other instruction sets than it was compiled for
};

}  // namespace optim_ext
