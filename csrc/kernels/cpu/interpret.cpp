#include "../interpret.h"

#include "../../rules/words.h"

#define OPTIM_EXT_INL "interpret-inl.h"
#include "for_each_isa.h"

namespace optim_ext {

namespace {

using rules::Scalar;

double value_of(const UniformInstruction& in, const double* registers, const Scalar* scalars) {
  const double a = registers[in.a], b = registers[in.b], c = registers[in.c];
  const auto truth = [](bool holds) { return holds ? 1.0 : 0.0; };
  switch (in.op) {
    case UniformOp::negate: return -a;
    case UniformOp::root: return rules::root(a);
    case UniformOp::sign: return rules::sign(a);
    case UniformOp::magnitude: return rules::magnitude(a);
    case UniformOp::exponential: return rules::exponential(a);
    case UniformOp::logarithm: return rules::logarithm(a);
    case UniformOp::add: return a + b;
    case UniformOp::subtract: return a - b;
    case UniformOp::multiply: return a * b;
    case UniformOp::divide: return a / b;
    case UniformOp::smaller: return rules::smaller(a, b);
    case UniformOp::larger: return rules::larger(a, b);
    case UniformOp::whole_power: return rules::whole_power(a, b);
    case UniformOp::real_power: return rules::real_power(a, b);
    case UniformOp::less: return truth(a < b);
    case UniformOp::less_equal: return truth(a <= b);
    case UniformOp::equal: return truth(a == b);
    case UniformOp::not_equal: return truth(a != b);
    case UniformOp::both: return truth(a != 0.0 && b != 0.0);
    case UniformOp::either: return truth(a != 0.0 || b != 0.0);
    case UniformOp::none: return truth(a == 0.0);
    case UniformOp::select: return a != 0.0 ? b : c;
    case UniformOp::lerp: return rules::lerp(a, b, c);
    case UniformOp::rounded: return rules::rounded(a, scalars[in.b].is_double);
  }
  return 0.0;
}

// of_norms: which registers depend on norms.
Fault fault_of(const UniformInstruction& in, const double* registers, const Fault* faults, const bool* of_norms) {
  const auto first_of = [&](std::initializer_list<uint16_t> read) {
    for (const uint16_t k : read) {
      if (faults[k] != Fault::none) return faults[k];
    }
    return Fault::none;
  };
  const double a = registers[in.a], b = registers[in.b];
  // Which of two values it will be is not known where that depends on norms.
  if (in.op == UniformOp::select && !of_norms[in.a]) return first_of({in.a, a != 0.0 ? in.b : in.c});
  if (in.op == UniformOp::rounded) return faults[in.a];
  const Fault before = first_of({in.a, in.b, in.c});
  if (before != Fault::none || of_norms[in.to]) return before;
  if (in.op == UniformOp::divide && b == 0.0) return Fault::divides_by_zero;
  if (in.op == UniformOp::whole_power && a == 0.0 && b < 0.0) return Fault::divides_by_zero;
  if (in.op == UniformOp::real_power && a == 0.0 && b < 0.0) return Fault::divides_by_zero;
  if (in.op == UniformOp::root && a < 0.0) return Fault::outside_domain;
  if (in.op == UniformOp::logarithm && a <= 0.0) return Fault::outside_domain;
  return Fault::none;
}

int first_norm(const RuleCode& code) { return code.hypers + 1 + code.scalars; }
int first_constant(const RuleCode& code) { return first_norm(code) + code.norms; }

// Puts what uniform code starts from into its registers.
void fill(const RuleCode& code, const OpenRule& rule, double step, const Scalar* scalars, double* registers) {
  for (int k = 0; k < code.hypers; ++k) registers[k] = rule.numbers[k];
  registers[code.hypers] = step;
  for (int k = 0; k < code.numbers(); ++k) registers[code.hypers + 1 + k] = scalars[k].value;
  double* const constants = registers + first_constant(code);
  for (size_t k = 0; k < code.constants.size(); ++k) constants[k] = code.constants[k];
}

void at_step(const void* given, double step, Scalar* scalars, void* to) {
  const OpenRule& rule = *static_cast<const OpenRule*>(given);
  const RuleCode& code = *rule.code;
  OpenRule& ready = *static_cast<OpenRule*>(to);
  double registers[RuleCode::kMostUniforms];
  fill(code, rule, step, scalars, registers);
  for (const UniformInstruction& in : code.uniform) registers[in.to] = value_of(in, registers, scalars);
  ready.code = rule.code;
  for (int k = 0; k < code.hypers; ++k) ready.numbers[k] = rule.numbers[k];
  for (size_t k = 0; k < code.fields.size(); ++k) ready.numbers[code.hypers + k] = registers[code.fields[k]];
  for (int k = 0; k < code.scalars; ++k) scalars[k].value = registers[code.scalar_results[k]];
}

// How many of the registers a, b and c an instruction reads.
int reads(TileOp op) {
  if (op < TileOp::add || op == TileOp::none) return 1;
  return op >= TileOp::select ? 3 : 2;
}

}  // namespace

std::vector<Fault> faults_of(const OpenRule& rule, double step, const Scalar* scalars) {
  const RuleCode& code = *rule.code;
  double registers[RuleCode::kMostUniforms];
  Fault faults[RuleCode::kMostUniforms] = {};
  bool of_norms[RuleCode::kMostUniforms] = {};
  fill(code, rule, step, scalars, registers);
  for (int k = first_norm(code); k < first_constant(code); ++k) of_norms[k] = true;
  for (const UniformInstruction& in : code.uniform) {
    const bool has_one = in.op == UniformOp::rounded;  // b names a scalar
    of_norms[in.to] = of_norms[in.a] || (!has_one && of_norms[in.b]) || of_norms[in.c];
    faults[in.to] = fault_of(in, registers, faults, of_norms);
    registers[in.to] = value_of(in, registers, scalars);
  }
  std::vector<Fault> found;
  for (const uint16_t k : code.fields) found.push_back(faults[k]);
  for (const uint16_t k : code.scalar_results) found.push_back(faults[k]);
  return found;
}

std::string RuleCode::problem() const {
  if (operands < 2 || operands > kMaxOperands) return "operands";
  if (scalars < 0 || norms < 0 || numbers() > kMaxScalars) return "scalars";
  if (hypers < 1 || bytes() > kMaxRuleBytes) return "hyper-parameters and fields";
  if ((used >> operands) != 0 || (updates & ~used) != 0 || ((updates >> kGradOperand) & 1u) != 0) return "masks";
  if (temporaries < 0 || registers() > kMostRegisters) return "registers";
  int filled = first_constant(*this) + static_cast<int>(constants.size());
  if (uniform_registers < filled || uniform_registers > kMostUniforms) return "uniform registers";
  std::vector<bool> is_set(static_cast<size_t>(uniform_registers), false);
  for (int k = 0; k < filled; ++k) is_set[k] = true;
  const auto holds = [&](int k) { return k < uniform_registers && is_set[k]; };
  for (const UniformInstruction& in : uniform) {
    if (in.op > UniformOp::rounded || in.to >= uniform_registers || in.to < filled) return "uniform code";
    const bool rounds = in.op == UniformOp::rounded;
    if (!holds(in.a) || (rounds ? in.b >= scalars : !holds(in.b)) || !holds(in.c)) return "uniform code";
    is_set[in.to] = true;
  }
  for (const uint16_t k : fields) {
    if (!holds(k)) return "fields";
  }
  if (scalar_results.size() != static_cast<size_t>(scalars)) return "scalars";
  for (const uint16_t k : scalar_results) {
    if (!holds(k)) return "scalars";
  }
  for (const Shared& value : shared) {
    if (value.field >= static_cast<int>(fields.size())) return "shared values";
  }
  std::vector<bool> written(static_cast<size_t>(registers()), false);
  for (int k = 0; k < operands; ++k) written[k] = ((used >> k) & 1u) != 0;
  for (int k = operands + temporaries; k < registers(); ++k) written[k] = true;
  const auto is_written = [&](int k) { return k < registers() && written[k]; };
  for (const TileInstruction& in : tile) {
    if (in.op > TileOp::subtract_product) return "tile code";
    const bool is_result = in.to < operands ? ((updates >> in.to) & 1u) != 0 : in.to < operands + temporaries;
    const int count = reads(in.op);
    if (!is_result || !is_written(in.a) || (count > 1 && !is_written(in.b)) || (count > 2 && !is_written(in.c)))
      return "tile code";
    // What is read once for all elements has to be the same for all.
    const int uniform_one = in.op == TileOp::choose ? in.a : in.op == TileOp::lerp_by ? in.c : -1;
    if (uniform_one >= 0 && uniform_one < operands + temporaries) return "tile code";
    written[in.to] = true;
  }
  return "";
}

void RuleCode::seal() {
  loops = {operands,      hypers,      operands + temporaries,           registers(), used, updates,
           shared.data(), tile.data(), static_cast<int64_t>(tile.size())};
}

RuleProgram interpreted(const RuleCode& code) {
  using namespace cpu;
  static constexpr Sweep in_float[] = OPTIM_EXT_OF_EACH_ISA(interpret<float>),
                         in_double[] = OPTIM_EXT_OF_EACH_ISA(interpret<double>);
  return {code.bytes(),   code.operands,
          code.used,      code.updates,
          code.numbers(), code.scalars > 0,
          &at_step,       {{in_float[0], in_double[0]}, {in_float[1], in_double[1]}, {in_float[2], in_double[2]}}};
}

}  // namespace optim_ext
