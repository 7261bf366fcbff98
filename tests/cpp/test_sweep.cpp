// Every rule, swept by every instruction set this machine has, against the same rule called one element at a time:
// the same bytes, whatever the length, the place to begin, the storage of each operand, the strides and the switches.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cases.h"
#include "isas.h"
#include "kernels/cpu/kernels.h"
#include "rules/all_rules.h"

using namespace optim_ext;

namespace {

// --- What a sweep has to do, said once more and slowly. ---

template <class Rule, class V>
void sweep_slowly(const Rule& rule, const Bundle& bundle, int64_t begin, int64_t end, const Pass& pass) {
  for (int64_t i = begin; i < end; ++i) {
    V value[Rule::kOperands] = {};
    int64_t at[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      at[k] = bundle.layout ? bundle.layout->offset(k, i) : i;
      if ((Rule::kUsed >> k) & 1u) value[k] = load_element<V>(bundle.data[k], bundle.storage[k], at[k]);
    }
    if (pass.unscale) {
      value[1] = value[1] / V(pass.grad_scale);
      store_element<V>(bundle.data[1], bundle.storage[1], at[1], value[1]);
    }
    value[1] *= V(pass.grad_factor);
    [&]<size_t... I>(std::index_sequence<I...>) { rule(value[I]...); }(std::make_index_sequence<Rule::kOperands>{});
    for (int k = 0; k < Rule::kOperands; ++k) {
      if ((Rule::kUpdates >> k) & 1u) store_element<V>(bundle.data[k], bundle.storage[k], at[k], value[k]);
    }
  }
}

template <class Rule, class V>
void test(const char* name, const std::vector<Storages>& mixes) {
  Random random{7};
  for (const Storages& storages : mixes) {
    for (int64_t numel = 0; numel <= 300; ++numel) {
      if (!chosen()) continue;
      const Scene scene = draw_scene(numel, random);
      const auto& [switches, zero, step, strides, pass, begin, end] = scene;
      const Rule rule = at_step(filled<Rule>(switches, zero, random), step);
      const Case start = make_case<Rule>(numel, storages, strides, random);
      Case expected = start.clone();
      sweep_slowly<Rule, V>(rule, expected.ready(), begin, end, pass);
      for (const auto& [isa_name, isa] : isas()) {
        Case got = start.clone();
        cpu::sweep_for<Rule, V>(isa)(rule, got.ready(), begin, end, pass);
        int operand = -1;
        int64_t element = -1;
        check(same(got, expected, &operand, &element),
              "%s on %s, V of %zu bytes, storages %d %d.., numel %ld [%ld, %ld), strides %d, unscale %d: operand %d, "
              "element %ld",
              name, isa_name, sizeof(V), static_cast<int>(storages[0]), static_cast<int>(storages.back()),
              static_cast<long>(numel), static_cast<long>(begin), static_cast<long>(end), strides, pass.unscale,
              operand, static_cast<long>(element));
      }
    }
  }
}

// Strided ones of many tiles, whole and in pieces.
template <class Rule, class V>
void test_long_strides(const char* name, Storage storage) {
  Random random{13};
  const Rule rule = at_step(filled<Rule>(0, -1, random), 2.0);
  for (const int64_t numel : {21 * 19 * 11, 8 * 8 * 40, 16 * 16 * 5, 9 * 17 * 23}) {
    for (int strides = kMixed; strides < kStrides; ++strides) {
      if (!chosen()) continue;
      const Case start = make_case<Rule>(numel, {storage}, strides, random);
      Case expected = start.clone();
      sweep_slowly<Rule, V>(rule, expected.ready(), 0, numel, Pass{});
      for (const auto& [isa_name, isa] : isas()) {
        for (const int64_t piece : {numel, int64_t(769), int64_t(100)}) {
          Case got = start.clone();
          for (int64_t begin = 0; begin < numel; begin += piece)
            cpu::sweep_for<Rule, V>(isa)(rule, got.ready(), begin, std::min(begin + piece, numel), Pass{});
          int operand = -1;
          int64_t element = -1;
          check(same(got, expected, &operand, &element),
                "%s on %s, strides %d, %ld in pieces of %ld: operand %d, element %ld", name, isa_name, strides,
                static_cast<long>(numel), static_cast<long>(piece), operand, static_cast<long>(element));
        }
      }
    }
  }
}

// Long enough for many tiles, and for the unconverted body to run in one go.
template <class Rule, class V>
void test_long(const char* name, const Storages& storages) {
  if (!chosen()) return;
  Random random{11};
  const Rule rule = at_step(filled<Rule>(0, -1, random), 2.0);
  const Case start = make_case<Rule>(100003, storages, false, random);
  Case expected = start.clone();
  sweep_slowly<Rule, V>(rule, expected.ready(), 0, 100003, Pass{});
  int operand = -1;
  int64_t element = -1;
  check(!same(start, expected, &operand, &element), "%s changes nothing", name);
  for (const auto& [isa_name, isa] : isas()) {
    Case whole = start.clone(), pieces = start.clone();
    const auto sweep = cpu::sweep_for<Rule, V>(isa);
    sweep(rule, whole.ready(), 0, 100003, Pass{});
    for (int64_t begin = 0; begin < 100003; begin += 769) {
      sweep(rule, pieces.ready(), begin, begin + 769 < 100003 ? begin + 769 : 100003, Pass{});
    }
    int operand = -1;
    int64_t element = -1;
    check(same(whole, expected, &operand, &element), "%s on %s, long: operand %d, element %ld", name, isa_name, operand,
          static_cast<long>(element));
    check(same(pieces, expected, &operand, &element), "%s on %s, in pieces: operand %d, element %ld", name, isa_name,
          operand, static_cast<long>(element));
  }
}

template <class Rule>
void test_rule(const char* name) {
  using enum Storage;
  test<Rule, float>(name, {{f32}, {bf16}, {f16}, {bf16, bf16, f32}, {f32, f16, bf16, f32, f16}, {f32, f32, bf16}});
  test<Rule, double>(name, {{f64}, {f64, f32, f64}, {f32, f64, bf16, f16, f64}});
  test_long<Rule, float>(name, {f32});
  test_long<Rule, float>(name, {bf16});
  test_long<Rule, double>(name, {f64});
  test_long_strides<Rule, float>(name, f32);
  test_long_strides<Rule, float>(name, bf16);
  test_long_strides<Rule, double>(name, f64);
}

}  // namespace

int main() {
  for (const auto& isa : isas()) std::printf("%s ", isa.first);
  std::printf("\n");
#define OPTIM_EXT_TEST(...) test_rule<rules::__VA_ARGS__>(#__VA_ARGS__);
  OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_TEST)
  return verdict();
}
