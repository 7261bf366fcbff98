// Rules that are not known when this library is built (optim_ext/_rules makes them from Python): as the code of a tile
// interpreter, and as programs that were compiled elsewhere.
//
// What a step has in common for all elements is *uniform code*, in double; what differs from element to element is
// *tile code*, each of whose instructions goes over a tile of elements that stays in the first-level cache.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace optim_ext {

// clang-format off
// What an instruction makes of registers a, b and c.
#define OPTIM_EXT_FOR_EACH_TILE_OP(X)                                                             \
  X(copy) X(negate) X(root) X(sign) X(magnitude) X(exponential) X(logarithm) /* of a */           \
  X(add) X(subtract) X(multiply) X(divide) X(smaller) X(larger)              /* of a and b */     \
  X(less) X(less_equal) X(equal) X(not_equal)                                /* one or zero */    \
  X(both) X(either) X(none)                                                  /* of such */        \
  X(select)                                                                  /* a ? b : c */      \
  X(choose)                                                                  /* a is uniform */   \
  X(lerp)                                                                    /* from a to b */    \
  X(lerp_by)                                                                 /* c is uniform */   \
  X(multiply_add)                                                            /* a * b + c */      \
  X(multiply_subtract)                                                       /* a * b - c */      \
  X(subtract_product)                                                        /* c - a * b */

#define OPTIM_EXT_FOR_EACH_UNIFORM_OP(X)                                                          \
  X(negate) X(root) X(sign) X(magnitude) X(exponential) X(logarithm)                              \
  X(add) X(subtract) X(multiply) X(divide) X(smaller) X(larger) X(whole_power) X(real_power)      \
  X(less) X(less_equal) X(equal) X(not_equal) X(both) X(either) X(none) X(select) X(lerp)         \
  X(rounded) /* to the precision in which scalar b of the state is kept */
// clang-format on

#define OPTIM_EXT_NAME(op) op,
enum class TileOp : uint8_t { OPTIM_EXT_FOR_EACH_TILE_OP(OPTIM_EXT_NAME) };
enum class UniformOp : uint8_t { OPTIM_EXT_FOR_EACH_UNIFORM_OP(OPTIM_EXT_NAME) };
#undef OPTIM_EXT_NAME

struct TileInstruction {
  TileOp op;
  uint8_t to, a, b, c;
};
struct UniformInstruction {
  UniformOp op;
  uint16_t to, a, b, c;
};

// A value that all elements share: a constant, or one that at_step has made.
struct Shared {
  int32_t field;  // -1: the constant
  double constant;
};

// The registers of tile code are the operands, temporaries and shared values, in this order; those of uniform code the
// hyper-parameters, the step count, the scalars of the state, norms that were measured before, constants and
// temporaries.
struct RuleCode {
  static constexpr int kMostRegisters = 64, kMostUniforms = 512;

  int operands, scalars, norms, hypers;
  bool counts;  // whether parameters have step counts
  unsigned used, updates;
  std::vector<double> constants;  // of uniform code
  std::vector<UniformInstruction> uniform;
  std::vector<uint16_t> fields;          // the registers that hold what tile code takes
  std::vector<uint16_t> scalar_results;  // the scalars after the step
  int uniform_registers;
  std::vector<TileInstruction> tile;
  int temporaries;
  std::vector<Shared> shared;

  // What the loops over elements take of it: they are compiled for an instruction set each, where no code of the
  // standard library may come into being.
  struct Loops {
    int operands, hypers, first_shared, registers;
    unsigned used, updates;
    const Shared* shared;
    const TileInstruction* tile;
    int64_t tile_count;
  } loops{};
  void seal();

  int registers() const { return operands + temporaries + static_cast<int>(shared.size()); }
  int numbers() const { return scalars + norms; }  // of a parameter, besides its step count
  int64_t bytes() const { return static_cast<int64_t>(sizeof(double) * (1 + hypers + fields.size())); }

  // What is wrong with it; empty if nothing is. Code that passes stays within its registers.
  std::string problem() const;
};

// A rule in memory, interpreted or compiled: a pointer to its code, hyper-parameters and fields. The first of the
// hyper-parameters is -1 where the objective is climbed, else 1; gradients are multiplied by it.
struct OpenRule {
  const RuleCode* code;
  double numbers[(kMaxRuleBytes - sizeof(void*)) / sizeof(double)];
};
static_assert(sizeof(OpenRule) == kMaxRuleBytes);

// Sealed code as a program, which points to it.
RuleProgram interpreted(const RuleCode& code);

// Why a value of uniform code is none: what Python would have raised.
enum class Fault : uint8_t { none, divides_by_zero, outside_domain };

// Runs the uniform code for its faults: that of each field, then of each scalar. What is made of norms has none of its
// own: norms are tensors to Python, whose arithmetic goes on with infinities and NaN.
std::vector<Fault> faults_of(const OpenRule& rule, double step, const rules::Scalar* scalars);

}  // namespace optim_ext
