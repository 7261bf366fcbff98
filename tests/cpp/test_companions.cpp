// Parameters and state that are kept in another way than a rule sees them, swept by every instruction set this machine
// has, against the same codecs and the same rule called one element at a time: the same bytes, wherever the pieces end.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "isas.h"
#include "kept_cases.h"
#include "rules/lamb.h"
#include "storage/kahan.h"
#include "storage/master.h"
#include "storage/remainder.h"
#include "storage/stochastic.h"

using namespace optim_ext;
using namespace optim_ext::kept;

namespace {

int64_t index_in_whole(const Place& place, int64_t i) {
  if (place.empty()) return i;
  int64_t at = place[0];
  for (auto d = static_cast<int64_t>(place.size()) - 2; d > 0; d -= 2) {
    at += i % place[d] * place[d + 1];
    i /= place[d];
  }
  return at;
}

// The whole; rows of it that are cut short, beyond 2^32 elements; and one whose order of memory is another.
std::vector<Place> places_of(const Shape& shape) {
  const int64_t far = (int64_t{1} << 32) - 100;
  return {{}, {far, shape.rows, shape.row + 37, shape.row, 1}, {7, shape.rows, 1, shape.row, shape.rows + 2}};
}

// What a parameter and its twin are together.
float kept_value(const Memory& memory, const Way& way, int64_t i) {
  const bool is_bf16 = way.param == bf16;
  const uint16_t param = reinterpret_cast<const uint16_t*>(memory.operands[0].data())[i];
  const unsigned char* const twin = memory.twin.data();
  if (way.precision == Precision::master) {
    const float master = reinterpret_cast<const float*>(twin)[i];
    return is_bf16 ? healed_bf16(master, param) : healed_f16(master, param);
  }
  if (way.precision == Precision::remainder) return join_master(param, reinterpret_cast<const int16_t*>(twin)[i]);
  const uint16_t lost = reinterpret_cast<const uint16_t*>(twin)[i];
  return is_bf16 ? join_compensated_bf16(param, lost) : join_compensated_f16(param, lost);
}

// What a sweep has to do, said once more and slowly.
template <class Rule>
void sweep_slowly(const Rule& rule, Memory& memory, const Way& way, const Shape& shape, const Place& place,
                  const Pass& pass) {
  const Ready ready(memory, way, shape, place);
  const Bundle& bundle = ready.bundle;
  std::vector<float> opened[5];
  const bool is_bf16 = way.param == bf16;
  auto* const params = reinterpret_cast<uint16_t*>(memory.operands[0].data());
  const auto block_of = [&](int64_t i) { return i / shape.row * shape.blocks() + i % shape.row / kBlock8; };
  for (int64_t i = 0; i < shape.numel(); ++i) {
    float value[5] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      if (!((Rule::kUsed >> k) & 1u)) continue;
      if (bundle.storage[k] == q8) {
        const uint8_t code = memory.operands[k][i], exponent = memory.exponents[k][block_of(i)];
        value[k] = (kPositive >> k) & 1u ? decode_positive8(code, exponent) : decode_signed8(code, exponent);
      } else {
        value[k] = load_element<float>(bundle.data[k], bundle.storage[k], i);
      }
    }
    if (way.precision != Precision::native) value[0] = kept_value(memory, way, i);
    if (pass.unscale) {
      value[1] /= static_cast<float>(pass.grad_scale);
      store_element<float>(bundle.data[1], bundle.storage[1], i, value[1]);
    }
    value[1] *= static_cast<float>(pass.grad_factor);
    [&]<size_t... I>(std::index_sequence<I...>) { rule(value[I]...); }(std::make_index_sequence<Rule::kOperands>{});
    for (int k = 0; k < 5; ++k) opened[k].push_back(value[k]);
  }
  for (int k = 0; k < Rule::kOperands; ++k) {
    if (!((Rule::kUpdates >> k) & 1u)) continue;
    for (int64_t i = 0; i < shape.numel(); ++i) {
      const float value = opened[k][i];
      const int64_t index = index_in_whole(place, i);
      const uint32_t word = RandomWords(kKey, index)(static_cast<uint32_t>(index));
      if (bundle.storage[k] == q8) {
        uint32_t largest = 0;
        for (int64_t j = 0; j < shape.numel(); ++j) {
          if (block_of(j) == block_of(i)) largest = std::max(largest, float_to_bits(opened[k][j]) & kMagnitude);
        }
        const uint8_t exponent = memory.exponents[k][block_of(i)] = exponent_of_block(largest);
        memory.operands[k][i] = (kPositive >> k) & 1u ? encode_positive8(value, exponent, word_of_state(word, true, 20))
                                                      : encode_signed8(value, exponent, word_of_state(word, false, 20));
      } else if ((way.by_chance >> k) & 1u && bundle.storage[k] == bf16) {
        const uint32_t random = k == 0 ? word_of_param(word) : word_of_state(word, (kPositive >> k) & 1u, 16);
        reinterpret_cast<uint16_t*>(bundle.data[k])[i] = narrow_bf16_by_chance(value, random);
      } else if (k == 0 && way.precision == Precision::remainder) {
        const SplitMaster split = split_master(value);
        params[i] = split.param;
        reinterpret_cast<int16_t*>(memory.twin.data())[i] = split.remainder;
      } else if (k == 0 && way.precision == Precision::kahan) {
        const CompensatedValue pair = is_bf16 ? compensate_bf16(value) : compensate_f16(value);
        params[i] = pair.param;
        reinterpret_cast<uint16_t*>(memory.twin.data())[i] = pair.compensation;
      } else {
        if (k == 0 && way.precision == Precision::master) reinterpret_cast<float*>(memory.twin.data())[i] = value;
        store_element<float>(bundle.data[k], bundle.storage[k], i, value);
      }
    }
  }
}

// What a sweep leaves, by every instruction set and in pieces of several sizes.
template <class Rule>
void test(const char* rule_name, const Rule& rule, const Way& way, const Shape& shape, const Place& place,
          const Pass& pass, const Memory& start) {
  Memory expected = start;
  sweep_slowly(rule, expected, way, shape, place, pass);
  for (const auto& [isa_name, isa] : isas()) {
    for (const int64_t piece : {shape.numel(), int64_t{256}, int64_t{7}}) {
      Memory got = start;
      sweep_in_pieces(rule, got, way, shape, pass, isa, piece, place);
      check(got == expected, "%s, %s on %s, %ld rows of %ld in pieces of %ld, %zu numbers of place, unscale %d",
            rule_name, way.name, isa_name, static_cast<long>(shape.rows), static_cast<long>(shape.row),
            static_cast<long>(piece), place.size(), pass.unscale);
    }
  }
}

// Gradients that leave infinities, NaN and what rounds to infinity, in some tiles and not in others.
void make_wild(Memory& memory, const Way& way, const Shape& shape) {
  const float largest = way.param == f16 ? 65504.0f : 3.3895e38f;
  const float wild[] = {largest, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
  for (int64_t n = 0; n < 3; ++n)
    store_element<float>(memory.operands[1].data(), way.param, shape.numel() * (n + 1) / 4, wild[n]);
}

template <class Rule>
void test(const char* rule_name, const Rule& rule) {
  Random random{23};
  for (const Way& way : kWays) {
    for (const Shape& shape : {Shape{2, 64}, {2, 700}, {1500, 1}}) {
      Memory start = draw_memory(way, shape, random);
      make_wild(start, way, shape);
      test(rule_name, rule, way, shape, {}, Pass{}, start);
    }
    for (const Shape& shape : {Shape{1, 1}, {3, 5}, {2, 64}, {20, 63}, {9, 100}, {2, 700}, {1500, 1}}) {
      for (const bool unscale : {false, true}) {
        Pass pass;
        pass.unscale = unscale;
        pass.grad_scale = 3.0;
        pass.grad_factor = 0.3;
        const Memory start = draw_memory(way, shape, random);
        Memory changed = start;
        sweep_slowly(rule, changed, way, shape, {}, pass);
        check(!(changed == start), "%s, %s changes nothing", rule_name, way.name);
        for (const Place& place : places_of(shape)) {
          if (place.empty() || !unscale) test(rule_name, rule, way, shape, place, pass, start);
        }
      }
    }
  }
}

// A rule that makes an operand of its own and updates nothing that is kept: wherever it begins and ends, it makes what
// the whole has there, and writes to nothing else but gradients that it unscales.
void test_reading() {
  Random random{29};
  rules::LambDirection direction{};
  direction.step_of.beta1 = 0.9, direction.step_of.beta2 = 0.99, direction.step_of.eps = 1e-8;
  direction.step_of.weight_decay = 0.1;
  const rules::LambDirection rule = direction.at_step(3.0);
  const unsigned updates = rules::LambDirection::kUpdates;
  for (Way way : kWays) {
    way.state[2] = f32;
    for (const Shape& shape : {Shape{3, 5}, {9, 100}, {2, 700}, {1500, 1}}) {
      Memory memory = draw_memory(way, shape, random);
      memory.operands[4].assign(shape.numel() * sizeof(float), 0);
      const Memory start = memory;
      Memory slow = start;
      sweep_slowly(rule, slow, way, shape, {}, Pass{});
      const bool has_twin = way.precision != Precision::native;
      for (const auto& [isa_name, isa] : isas()) {
        for (const int64_t piece : {int64_t{2048}, int64_t{97}}) {
          Memory got = start;
          const Ready ready(got, way, shape, {});
          const cpu::Sweep sweep = program_of<rules::LambDirection>().sweep[static_cast<int>(isa)][0];
          const cpu::ReadyRule ready_rule{sweep, &rule, 5, rules::LambDirection::kUsed, updates};
          std::vector<float> kept(shape.numel());
          for (int64_t begin = 0; begin < shape.numel(); begin += piece) {
            const int64_t end = std::min(begin + piece, shape.numel());
            cpu::companions_kernel_for(isa)(ready_rule, ready.bundle, begin, end, Pass{});
            if (has_twin) cpu::read_kept_kernel_for(isa)(ready.bundle, begin, end, kept.data() + begin);
          }
          check(got == slow, "%s read on %s, %ld rows of %ld in pieces of %ld", way.name, isa_name,
                static_cast<long>(shape.rows), static_cast<long>(shape.row), static_cast<long>(piece));
          if (!has_twin) continue;
          for (int64_t i = 0; i < shape.numel(); ++i) {
            const float value = kept_value(start, way, i);
            check(std::memcmp(&value, &kept[i], sizeof value) == 0, "%s: element %ld is %g, expected %g on %s",
                  way.name, static_cast<long>(i), static_cast<double>(kept[i]), static_cast<double>(value), isa_name);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test("Adam", adam());
  test("Lion", lion());
  test_reading();
  return verdict();
}
