// Parameters and state that are kept in another way than a rule sees them, swept by every instruction set this machine
// has, against the same codecs and the same rule called one element at a time: the same bytes, wherever the pieces end.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "isas.h"
#include "kernels/convert.h"
#include "kernels/cpu/companions.h"
#include "rules/adam.h"
#include "rules/lion.h"
#include "storage/kahan.h"
#include "storage/master.h"
#include "storage/remainder.h"
#include "storage/stochastic.h"

using namespace optim_ext;

namespace {

// How one parameter and its state are kept.
struct Way {
  const char* name;
  Precision precision;
  Storage param, state[3];  // of the parameter, and of operands 2, 3 and 4
  unsigned by_chance;       // the operands that are rounded so
};

using enum Storage;
constexpr Way kWays[] = {
    {"master bf16", Precision::master, bf16, {f32, f32, f32}, 0},
    {"master f16", Precision::master, f16, {f32, f32, f32}, 0},
    {"remainder", Precision::remainder, bf16, {f32, f32, f32}, 0},
    {"remainder, bf16 state", Precision::remainder, bf16, {bf16, bf16, bf16}, 7u << 2},
    {"remainder, q8 state", Precision::remainder, bf16, {q8, q8, q8}, 7u << 2},
    {"kahan bf16", Precision::kahan, bf16, {f32, bf16, f32}, 1u << 3},
    {"kahan f16", Precision::kahan, f16, {f32, f16, f32}, 0},
    {"stochastic", Precision::native, bf16, {f32, f32, f32}, 1u},
    {"stochastic, bf16 state", Precision::native, bf16, {bf16, bf16, bf16}, 1u | 7u << 2},
    {"stochastic, q8 state", Precision::native, bf16, {q8, q8, q8}, 1u | 7u << 2},
    {"f32, q8 state", Precision::native, f32, {q8, q8, q8}, 7u << 2},
    {"f32, mixed state", Precision::native, f32, {q8, bf16, f32}, 3u << 2},
};

// The memory of one parameter with everything beside it. What starts out must be a thing that steps can have left.
struct Memory {
  std::vector<unsigned char> operands[5], twin, exponents[5];
  bool operator==(const Memory&) const = default;
};

constexpr unsigned kPositive = 1u << 3 | 1u << 4;
constexpr uint64_t kKey = 0x123456789abcdef0u;

struct Shape {
  int64_t rows, row;
  int64_t numel() const { return rows * row; }
  int64_t blocks() const { return (row + kBlock8 - 1) / kBlock8; }
};

struct Ready {
  Bundle bundle{};
  Companions companions{};
  Ready(Memory& memory, const Way& way, const Shape& shape) {
    const Storage storage[] = {way.param, way.param, way.state[0], way.state[1], way.state[2]};
    for (int k = 0; k < 5; ++k) {
      bundle.data[k] = memory.operands[k].data();
      bundle.storage[k] = storage[k];
      if (storage[k] != q8) continue;
      companions.exponents[k] = memory.exponents[k].data();
      companions.row = shape.row;
      companions.blocks_of_row = shape.blocks();
    }
    bundle.numel = shape.numel();
    companions.precision = way.precision;
    companions.twin = memory.twin.data();
    companions.key = kKey;
    companions.by_chance = way.by_chance;
    companions.positive = kPositive;
    bundle.companions = &companions;
  }
  Ready(const Ready&) = delete;
};

Memory draw_memory(const Way& way, const Shape& shape, Random& random) {
  Memory memory;
  const Storage storage[] = {way.param, way.param, way.state[0], way.state[1], way.state[2]};
  for (int k = 0; k < 5; ++k) {
    memory.operands[k].resize(shape.numel() * bytes_of(storage[k]));
    if (storage[k] == q8) {
      for (unsigned char& code : memory.operands[k]) code = static_cast<unsigned char>(random.bits());
      memory.exponents[k].resize(shape.rows * shape.blocks());
      for (unsigned char& exponent : memory.exponents[k]) exponent = static_cast<unsigned char>(110 + random.below(12));
      continue;
    }
    for (int64_t i = 0; i < shape.numel(); ++i) {
      const double value = random.one_in(9) ? 0.0 : random.uniform(k < 3 ? -2.0 : 0.0, 2.0);
      store_element<float>(memory.operands[k].data(), storage[k], i, static_cast<float>(value));
    }
  }
  const bool is_master = way.precision == Precision::master;
  if (way.precision != Precision::native) memory.twin.resize(shape.numel() * (is_master ? 4 : 2));
  for (int64_t i = 0; i < static_cast<int64_t>(memory.twin.size()) / (is_master ? 4 : 2); ++i) {
    const float param = load_element<float>(memory.operands[0].data(), way.param, i);
    if (is_master) {  // one in nine is not the parameter's any more
      store_element<float>(memory.twin.data(), f32, i, param * (random.one_in(9) ? 1.5f : 1.0001f));
    } else if (way.precision == Precision::kahan) {
      store_element<float>(memory.twin.data(), way.param, i, param * 0.001f);
    } else {
      const auto remainder = static_cast<int16_t>(random.bits());
      std::memcpy(memory.twin.data() + 2 * i, &remainder, 2);
    }
  }
  return memory;
}

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
            const Ready ready(got, way, shape);
            const cpu::Sweep sweep = program_of<Rule>().sweep[static_cast<int>(isa)][0];
            const cpu::ReadyRule ready_rule{sweep, &rule, Rule::kOperands, Rule::kUsed, Rule::kUpdates};
            for (int64_t begin = 0; begin < shape.numel(); begin += piece) {
              const int64_t from = ready.companions.end_of_piece(begin);
              const int64_t to = ready.companions.end_of_piece(std::min(begin + piece, shape.numel()));
              if (from < to) cpu::companions_kernel_for(isa)(ready_rule, ready.bundle, from, to, pass);
            }
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
  rules::Adam<true> adam{};
  adam.lr = 0.01, adam.beta1 = 0.9, adam.beta2 = 0.99, adam.eps = 1e-8, adam.weight_decay = 0.1;
  adam.decoupled_weight_decay = true;
  test("Adam", adam.at_step(3.0));
  rules::Lion lion{};
  lion.lr = 0.01, lion.beta1 = 0.9, lion.beta2 = 0.99, lion.weight_decay = 0.1;
  test("Lion", lion.at_step(3.0));
  return verdict();
}
