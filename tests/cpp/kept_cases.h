// Made-up work for parameters and state that are kept in another way than a rule sees them.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "kernels/convert.h"
#include "kernels/cpu/companions.h"
#include "rules/adam.h"
#include "rules/lion.h"

namespace optim_ext::kept {

// How one parameter and its state are kept.
struct Way {
  const char* name;
  Precision precision;
  Storage param, state[3];  // of the parameter, and of operands 2, 3 and 4
  unsigned by_chance;       // the operands that are rounded so
};

using enum Storage;

inline constexpr Way kWays[] = {
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

// Where a part is in the whole: its first element, then size and stride of each dimension; nothing: it is the whole.
using Place = std::vector<int64_t>;

// What refers to it must not outlive `place`.
struct Ready {
  Bundle bundle{};
  Companions companions{};
  Ready(Memory& memory, const Way& way, const Shape& shape, const Place& place) {
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
    companions.place = place.empty() ? nullptr : place.data();
    companions.place_ndim = static_cast<int>(place.size() / 2);
    bundle.companions = &companions;
  }
  Ready(const Ready&) = delete;
};

inline Memory draw_memory(const Way& way, const Shape& shape, Random& random) {
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

// One step of the rule, in pieces of so many elements, by one instruction set. `rows`: those that the gradient holds.
template <class Rule>
void sweep_in_pieces(const Rule& rule, Memory& memory, const Way& way, const Shape& shape, const Pass& pass,
                     cpu::Isa isa, int64_t piece, const Place& place = {}, const Layout* rows = nullptr) {
  Ready ready(memory, way, shape, place);
  if (rows != nullptr) {
    ready.bundle.layout = rows;
    ready.bundle.numel = rows->sizes[0] * rows->sizes[1];
  }
  const cpu::Sweep sweep = program_of<Rule>().sweep[static_cast<int>(isa)][0];
  const cpu::ReadyRule ready_rule{sweep, &rule, Rule::kOperands, Rule::kUsed, Rule::kUpdates};
  for (int64_t begin = 0; begin < ready.bundle.numel; begin += piece) {
    const int64_t from = ready.companions.end_of_piece(begin);
    const int64_t to = ready.companions.end_of_piece(std::min(begin + piece, ready.bundle.numel));
    if (from < to) cpu::companions_kernel_for(isa)(ready_rule, ready.bundle, from, to, pass);
  }
}

// The rules that are swept so.
inline rules::Adam<true> adam() {
  rules::Adam<true> rule{};
  rule.lr = 0.01, rule.beta1 = 0.9, rule.beta2 = 0.99, rule.eps = 1e-8, rule.weight_decay = 0.1;
  rule.decoupled_weight_decay = true;
  return rule.at_step(3.0);
}

inline rules::Lion lion() {
  rules::Lion rule{};
  rule.lr = 0.01, rule.beta1 = 0.9, rule.beta2 = 0.99, rule.weight_decay = 0.1;
  return rule.at_step(3.0);
}

}  // namespace optim_ext::kept
