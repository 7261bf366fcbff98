// Parameters and state that are kept in another way than a rule sees them, swept by every instruction set this machine
// has, against the same codecs and the same rule called one element at a time: the same bytes, wherever the pieces end.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isas.h"
#include "kept_cases.h"
#include "storage/kahan.h"
#include "storage/master.h"
#include "storage/remainder.h"
#include "storage/stochastic.h"

using namespace optim_ext;
using namespace optim_ext::kept;

namespace {

// What a sweep has to do, said once more and slowly.
template <class Rule>
void sweep_slowly(const Rule& rule, Memory& memory, const Way& way, const Shape& shape, const Pass& pass) {
  const Ready ready(memory, way, shape);
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
    if (way.precision == Precision::master) {
      const float master = reinterpret_cast<float*>(memory.twin.data())[i];
      value[0] = is_bf16 ? healed_bf16(master, params[i]) : healed_f16(master, params[i]);
    } else if (way.precision == Precision::remainder) {
      value[0] = join_master(params[i], reinterpret_cast<int16_t*>(memory.twin.data())[i]);
    } else if (way.precision == Precision::kahan) {
      const uint16_t lost = reinterpret_cast<uint16_t*>(memory.twin.data())[i];
      value[0] = is_bf16 ? join_compensated_bf16(params[i], lost) : join_compensated_f16(params[i], lost);
    }
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
      const uint32_t word = RandomWords(kKey, i)(static_cast<uint32_t>(i));
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

template <class Rule>
void test(const char* rule_name, const Rule& rule) {
  Random random{23};
  for (const Way& way : kWays) {
    for (const Shape& shape : {Shape{1, 1}, {3, 5}, {2, 64}, {20, 63}, {9, 100}, {2, 700}, {1500, 1}}) {
      for (const bool unscale : {false, true}) {
        if (!chosen()) continue;
        Pass pass;
        pass.unscale = unscale;
        pass.grad_scale = 3.0;
        pass.grad_factor = 0.3;
        const Memory start = draw_memory(way, shape, random);
        Memory expected = start;
        sweep_slowly(rule, expected, way, shape, pass);
        check(!(expected == start), "%s, %s changes nothing", rule_name, way.name);
        for (const auto& [isa_name, isa] : isas()) {
          for (const int64_t piece : {shape.numel(), int64_t{256}, int64_t{7}}) {
            Memory got = start;
            sweep_in_pieces(rule, got, way, shape, pass, isa, piece);
            check(got == expected, "%s, %s on %s, %ld rows of %ld in pieces of %ld, unscale %d", rule_name, way.name,
                  isa_name, static_cast<long>(shape.rows), static_cast<long>(shape.row), static_cast<long>(piece),
                  unscale);
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
  return verdict();
}
