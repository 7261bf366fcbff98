// A rule that was compiled apart from this library. No header of the standard library: that would cost every such unit
// a third of its time.
#pragma once

#include "program.h"

namespace optim_ext {

// A rule as it is run.
struct RulePrograms {
  const RuleProgram* rule;
  const RuleProgram* for_norms;  // makes, as operands after those of the rule, what norms are taken of before; or null
};

namespace cpu {

// How tiles are opened and closed, in float and in double: of a TileOperand and a Start of tiles-inl.h. The libraries
// of rules do without code of their own for that.
struct TileMoves {
  using Load = void (*)(const void* of, const void* start, int64_t n, void* buffer);
  using Store = void (*)(const void* of, const void* start, int64_t n, const void* buffer);
  Load load[2];
  Store store[2];
};

const TileMoves& tile_moves_for(Isa isa);

}  // namespace cpu

// What the library that holds one exports, as optim_ext_rule(moves). All sizes have to be those of the reader.
struct CompiledRule {
  static constexpr int32_t kAbi = 3;
  using Get = const CompiledRule* (*)(const cpu::TileMoves*);
  int32_t abi;
  int32_t bundle_bytes, pass_bytes, layout_bytes, program_bytes;
  RulePrograms programs;  // without sweeps for other instruction sets than they were compiled for
};

}  // namespace optim_ext
