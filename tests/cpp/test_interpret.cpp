// The tile interpreter against the sweep of a built-in rule: the same bytes, whatever the length, the place to begin,
// the storage of each operand, the strides and what happens to gradients. And which code is refused.
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cases.h"
#include "isas.h"
#include "kernels/interpret.h"
#include "rules/lion.h"
#include "rules/words.h"

using namespace optim_ext;

namespace {

// Lion: hyper-parameters are the direction, lr, both betas and the weight decay.
RuleCode lion() {
  using T = TileOp;
  using U = UniformOp;
  RuleCode code{};
  code.operands = 3;
  code.hypers = 5;
  code.used = 7;
  code.updates = 5;
  // Registers 0 to 4 hyper-parameters, 5 the step, 6 a constant, then temporaries.
  code.constants = {1.0};
  code.uniform = {
      {U::subtract, 7, 6, 2, 0}, {U::subtract, 8, 6, 3, 0}, {U::multiply, 9, 1, 4, 0}, {U::subtract, 10, 6, 9, 0}};
  code.uniform_registers = 11;
  code.fields = {2, 7, 3, 8, 10, 1};
  // Registers 0 to 2 operands, 3 and 4 temporaries, 5 to 10 shared values.
  code.temporaries = 2;
  code.shared = {{0, 0.0}, {1, 0.0}, {2, 0.0}, {3, 0.0}, {4, 0.0}, {5, 0.0}};
  code.tile = {{T::multiply, 3, 6, 1, 1},         {T::multiply_add, 3, 5, 2, 3}, {T::sign, 3, 3, 3, 3},
               {T::multiply, 4, 8, 1, 1},         {T::multiply_add, 2, 7, 2, 4}, {T::multiply, 4, 9, 0, 0},
               {T::subtract_product, 0, 10, 3, 4}};
  return code;
}

template <class V>
void test_lion(const std::vector<Storages>& mixes) {
  RuleCode code = lion();
  code.seal();
  const RuleProgram program = interpreted(code);
  Random random{5};
  for (const Storages& storages : mixes) {
    for (int64_t numel = 0; numel <= 2100; numel += numel < 300 ? 1 : 97) {
      rules::Lion rule{0.1, 0.9, 0.99, random.one_in(3) ? 0.0 : 0.3, random.one_in(3)};
      OpenRule open{&code, {rule.maximize ? -1.0 : 1.0, rule.lr, rule.beta1, rule.beta2, rule.weight_decay}}, ready{};
      program.at_step(&open, 3.0, nullptr, &ready);
      Pass pass;
      pass.unscale = random.one_in(4);
      pass.grad_scale = 3.0;
      if (random.one_in(3)) pass.grad_factor = 0.3;
      const int strides = numel > 0 && random.one_in(2) ? static_cast<int>(1 + random.below(kStrides - 1)) : kDense;
      const int64_t begin = random.one_in(5) ? numel / 3 : 0, end = random.one_in(7) ? numel - numel / 4 : numel;
      const Case start = make_case<rules::Lion>(numel, storages, strides, random);
      Case expected = start.clone();
      cpu::sweep_for<rules::Lion, V>(cpu::Isa::baseline)(rule, expected.ready(), begin, end, pass);
      for (const auto& [name, isa] : isas()) {
        Case got = start.clone();
        program.sweep[static_cast<int>(isa)][sizeof(V) == sizeof(double)](&ready, got.ready(), begin, end, pass);
        int operand = -1;
        int64_t element = -1;
        check(same(got, expected, &operand, &element),
              "%s, V of %zu bytes, numel %ld, strides %d: operand %d, element %ld", name, sizeof(V),
              static_cast<long>(numel), strides, operand, static_cast<long>(element));
      }
    }
  }
}

// Code that would leave its registers, read what was never written, or write what is not its own.
void test_refusals() {
  const std::vector<std::pair<const char*, std::function<void(RuleCode&)>>> damages{
      {"operands", [](RuleCode& code) { code.operands = 1; }},
      {"operands", [](RuleCode& code) { code.operands = kMaxOperands + 1; }},
      {"scalars", [](RuleCode& code) { code.scalars = 3; }},
      {"scalars", [](RuleCode& code) { code.scalar_results = {1}; }},
      {"scalars", [](RuleCode& code) { code.norms = 3; }},
      {"scalars", [](RuleCode& code) { code.norms = -1; }},
      {"hyper-parameters and fields", [](RuleCode& code) { code.hypers = 0; }},
      {"hyper-parameters and fields", [](RuleCode& code) { code.hypers = 200; }},
      {"masks", [](RuleCode& code) { code.updates = 7; }},
      {"masks", [](RuleCode& code) { code.used = 15; }},
      {"registers", [](RuleCode& code) { code.temporaries = 60; }},
      {"uniform registers", [](RuleCode& code) { code.uniform_registers = 600; }},
      {"uniform registers", [](RuleCode& code) { code.uniform_registers = 3; }},
      {"uniform code", [](RuleCode& code) { code.uniform[0].to = 11; }},
      {"uniform code", [](RuleCode& code) { code.uniform[0].to = 1; }},
      {"uniform code", [](RuleCode& code) { code.uniform[0].a = 10; }},
      {"uniform code", [](RuleCode& code) { code.uniform[0] = {UniformOp::rounded, 7, 1, 0, 0}; }},
      {"fields", [](RuleCode& code) { code.fields[0] = 11; }},
      {"shared values", [](RuleCode& code) { code.shared[0].field = 6; }},
      {"tile code", [](RuleCode& code) { code.tile[0].to = 1; }},
      {"tile code", [](RuleCode& code) { code.tile[0].to = 5; }},
      {"tile code", [](RuleCode& code) { code.tile[0].a = 11; }},
      {"tile code", [](RuleCode& code) { code.tile[0].a = 3; }},
      {"tile code", [](RuleCode& code) { code.tile[0] = {TileOp::choose, 3, 0, 1, 2}; }},
  };
  check(lion().problem().empty(), "sound code is refused: %s", lion().problem().c_str());
  for (const auto& [expected, damage] : damages) {
    RuleCode code = lion();
    damage(code);
    check(code.problem() == expected, "expected '%s', found '%s'", expected, code.problem().c_str());
  }
}

void test_words() {
  Random random{3};
  for (int i = 0; i < 20000; ++i) {
    const double x = random.uniform(-700.0, 700.0), y = std::exp(random.uniform(-700.0, 700.0));
    check(std::fabs(rules::exponential(x) / std::exp(x) - 1.0) < 4e-15, "exponential(%a)", x);
    check(std::fabs(rules::logarithm(y) - std::log(y)) <= 4e-16 * std::fabs(std::log(y)) + 1e-18, "logarithm(%a)", y);
  }
  const double inf = INFINITY;
  check(rules::exponential(inf) == inf && rules::exponential(800.0) == inf, "exponential of much");
  check(rules::exponential(-inf) == 0.0 && rules::exponential(-800.0) == 0.0, "exponential of little");
  check(rules::exponential(0.0) == 1.0 && std::isnan(rules::exponential(NAN)), "exponential of 0 and NaN");
  check(rules::logarithm(0.0) == -inf && rules::logarithm(inf) == inf && rules::logarithm(1.0) == 0.0, "logarithm");
  check(std::isnan(rules::logarithm(-1.0)) && std::isnan(rules::logarithm(NAN)), "logarithm of what has none");
  check(std::fabs(rules::logarithm(5e-324) - std::log(5e-324)) < 1e-12, "logarithm of the smallest number");
  check(
      rules::smaller(1.0, 2.0) == 1.0 && std::isnan(rules::smaller(NAN, 1.0f)) && std::isnan(rules::smaller(1.0f, NAN)),
      "smaller");
  check(rules::whole_power(2.0, -3.0) == 0.125 && rules::whole_power(2.0, 3.0) == 8.0, "whole_power");
}

}  // namespace

int main() {
  using enum Storage;
  test_lion<float>({{f32}, {bf16}, {f16}, {f32, bf16, f32}, {bf16, f32, f32}});
  test_lion<double>({{f64}, {f64, f32, f64}, {f64, bf16}});
  test_refusals();
  test_words();
  return verdict();
}
