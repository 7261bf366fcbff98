// What a unit that holds one rule, compiled apart from this library for one instruction set, is made with: a line that
// says which, OPTIM_EXT_ONLY_BASELINE, _AVX2 or _AVX512; this header; the rule; OPTIM_EXT_EXPORT_RULE. (Such units are
// written by optim_ext/_rules/native_text.py.)
#include "../../rules/words.h"
#include "../compiled_rule.h"
#include "../program_without_kernels.h"
#include "isa.h"

#if defined(OPTIM_EXT_ONLY_AVX512)
#define OPTIM_EXT_TARGET_AVX512
#define OPTIM_EXT_ISA isa_avx512
#define OPTIM_EXT_REGISTER_BYTES 64
#include "target_begin.h"
#elif defined(OPTIM_EXT_ONLY_AVX2)
#define OPTIM_EXT_TARGET_AVX2
#define OPTIM_EXT_ISA isa_avx2
#define OPTIM_EXT_REGISTER_BYTES 32
#include "target_begin.h"
#else
#define OPTIM_EXT_ISA isa_baseline
#define OPTIM_EXT_REGISTER_BYTES 16
#endif
#include "sweep-inl.h"
#if defined(OPTIM_EXT_TARGET_AVX512) || defined(OPTIM_EXT_TARGET_AVX2)
#include "target_end.h"
#endif

namespace optim_ext::cpu {

static const TileMoves* moves;  // of the library that loads this one

namespace OPTIM_EXT_ISA {

template <class V>
void TileOperand<V>::load(const Start& start, int64_t n, V* buffer) const {
  moves->load[sizeof(V) == sizeof(double)](this, &start, n, buffer);
}

template <class V>
void TileOperand<V>::store(const Start& start, int64_t n, const V* buffer) const {
  moves->store[sizeof(V) == sizeof(double)](this, &start, n, buffer);
}

}  // namespace OPTIM_EXT_ISA

template <class Rule>
constexpr Sweep kSweeps[] = {&OPTIM_EXT_ISA::sweep<Rule, float>, &OPTIM_EXT_ISA::sweep<Rule, double>};

#if defined(OPTIM_EXT_ONLY_AVX512)
constexpr Isa kOnlyIsa = Isa::avx512;
#elif defined(OPTIM_EXT_ONLY_AVX2)
constexpr Isa kOnlyIsa = Isa::avx2;
#else
constexpr Isa kOnlyIsa = Isa::baseline;
#endif

template <class Rule>
constexpr RuleProgram compiled_program() {
  RuleProgram program = program_without_kernels<Rule>();
  for (int k = 0; k < 2; ++k) program.sweep[static_cast<int>(kOnlyIsa)][k] = kSweeps<Rule>[k];
  return program;
}

template <class Rule>
inline constexpr RuleProgram kProgram = compiled_program<Rule>();

// A rule that norms are computed for names, as ForNorms, the one that makes what they are taken of.
template <class Rule>
constexpr RulePrograms compiled_programs() {
  if constexpr (requires { typename Rule::ForNorms; }) {
    return {&kProgram<Rule>, &kProgram<typename Rule::ForNorms>};
  } else {
    return {&kProgram<Rule>, nullptr};
  }
}

}  // namespace optim_ext::cpu

#define OPTIM_EXT_EXPORT_RULE(Rule)                                                                                \
  extern "C" __attribute__((visibility("default"))) const optim_ext::CompiledRule* optim_ext_rule(                 \
      const optim_ext::cpu::TileMoves* moves) {                                                                    \
    static constexpr optim_ext::CompiledRule rule{                                                                 \
        optim_ext::CompiledRule::kAbi, sizeof(optim_ext::Bundle),      sizeof(optim_ext::Pass),                    \
        sizeof(optim_ext::Layout),     sizeof(optim_ext::RuleProgram), optim_ext::cpu::compiled_programs<Rule>()}; \
    optim_ext::cpu::moves = moves;                                                                                 \
    return &rule;                                                                                                  \
  }
