// Rounding to bfloat16 up or down by chance, in proportion to what lies on either side, and the random words for it.
//
// A word belongs to an element of a parameter at a step: it is a hash of these, so that the same element gets the same
// word whichever thread, instruction set or device asks, on any share of the tensor, and again after a restart.
#pragma once

#include "native.h"

namespace optim_ext {

// splitmix64 (Steele, Lea & Flood 2014).
OPTIM_EXT_HOST_DEVICE uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// What the words of one parameter at one step have in common: a chain over the seed, the parameter's key and the step.
OPTIM_EXT_HOST_DEVICE uint64_t rounding_key(uint64_t seed, uint64_t param) {
  return splitmix64(splitmix64(seed) ^ param);
}
OPTIM_EXT_HOST_DEVICE uint64_t key_at_step(uint64_t rounding_key, uint64_t step) {
  return splitmix64(rounding_key ^ step);
}

// The words of 2^32 elements, those whose index has the same upper half.
struct RandomWords {
  uint32_t k0, k1;

  // key: key_at_step().
  OPTIM_EXT_HOST_DEVICE RandomWords(uint64_t key, int64_t index) {
    const uint64_t mixed = splitmix64(key ^ (static_cast<uint64_t>(index) >> 32));
    k0 = static_cast<uint32_t>(mixed);
    k1 = static_cast<uint32_t>(mixed >> 32);
  }

  OPTIM_EXT_HOST_DEVICE uint32_t operator()(uint32_t index) const {
    uint32_t x = index ^ k0;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x += k1;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// A parameter takes the low half of its element's word, a state without a sign the upper bits (16 or 20 of them), one
// with a sign those of another word that is made of it.
OPTIM_EXT_HOST_DEVICE uint32_t word_of_param(uint32_t word) { return word & 0xffffu; }
OPTIM_EXT_HOST_DEVICE uint32_t word_of_state(uint32_t word, bool is_positive, int bits) {
  const uint32_t other = (word ^ word >> 15) * 0x2c1b3c6du;
  return (is_positive ? word : other ^ other >> 12) >> (32 - bits);
}

// The usual case: nothing is as large as this, so that rounding ends below infinity and there is nothing to choose.
constexpr uint32_t kMayRoundToInfinity = kInfinity - 0xffffu;
OPTIM_EXT_HOST_DEVICE uint16_t narrow_small_bf16_by_chance(float value, uint32_t random) {
  return static_cast<uint16_t>((float_to_bits(value) + random) >> 16);
}

// `random`: 16 bits. Infinity and NaN stay what they are, and no finite value becomes infinite.
OPTIM_EXT_HOST_DEVICE uint16_t narrow_bf16_by_chance(float value, uint32_t random) {
  const uint32_t bits = float_to_bits(value), down = bits >> 16, chosen = narrow_small_bf16_by_chance(value, random);
  const uint32_t magnitude = bits & kMagnitude;
  const uint32_t finite = (chosen & 0x7fffu) >= 0x7f80u ? down : chosen;
  const uint32_t special = magnitude > kInfinity ? (down & 0x8000u) | 0x7fc0u : down;
  return static_cast<uint16_t>(magnitude < kInfinity ? finite : special);
}

}  // namespace optim_ext
