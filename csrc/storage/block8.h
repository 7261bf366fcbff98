// Eight bits an element, and one exponent for each block of 64. An exponent is the block's own; a code says how far an
// element's exponent lies below it and the upper bits of its fraction, so that an element is off by its own size times
// a constant, not by the size of the largest one.
//
// A block with an infinity or NaN in it is NaN as a whole: what is wrong with a state shows.
#pragma once

#include "native.h"

namespace optim_ext {

constexpr int64_t kBlock8 = 64;                          // elements
constexpr int32_t kNotFinite = 255;                      // the exponent of a block that holds an infinity or NaN
constexpr int32_t kLeastExponent = 32;                   // below it codes would reach subnormal numbers
constexpr int32_t kFractionBits = 20;                    // of a float's 23 that a code drops
constexpr int32_t kSignedSpan = 15, kPositiveSpan = 31;  // exponents below that of the block

// `largest`: the largest bits of a magnitude in the block. Rounded up where the largest element would round to more
// than a code can say: cut off there, it could never grow.
OPTIM_EXT_HOST_DEVICE uint8_t exponent_of_block(uint32_t largest) {
  const int32_t exponent = static_cast<int32_t>((largest + 0xfffffu) >> 23);
  const int32_t finite = exponent > kNotFinite - 1   ? kNotFinite - 1
                         : exponent < kLeastExponent ? kLeastExponent
                                                     : exponent;
  return static_cast<uint8_t>(largest >= kInfinity ? kNotFinite : finite);
}

// What rounds to nearest in place of random bits.
constexpr uint32_t kToNearest = 1u << (kFractionBits - 1);

// Numbers are rounded up or down by chance (`random`: 20 bits), as an average that moves by less than half of its last
// place would never move.

// Either sign: 1 bit for it, 4 of exponent, 3 of fraction.
OPTIM_EXT_HOST_DEVICE uint8_t encode_signed8(float value, uint8_t exponent, uint32_t random) {
  const uint32_t bits = float_to_bits(value);
  const int32_t least = (exponent - kSignedSpan) << 23;
  const int32_t rounded =
      (static_cast<int32_t>(bits & kMagnitude) - least + static_cast<int32_t>(random)) >> kFractionBits;
  const int32_t code = rounded < 0 ? 0 : rounded > 127 ? 127 : rounded;
  return static_cast<uint8_t>(static_cast<uint32_t>(code) | ((bits >> 24) & 0x80u));
}

OPTIM_EXT_HOST_DEVICE float decode_signed8(uint8_t code, uint8_t exponent) {
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t number = (magnitude << kFractionBits) + (static_cast<uint32_t>(exponent - kSignedSpan) << 23);
  const uint32_t finite = magnitude == 0 ? 0 : number;
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  return bits_to_float(exponent == kNotFinite ? 0x7fc00000u : finite | sign);
}

// No sign: 5 bits of exponent, 3 of fraction. A value above zero never becomes zero.
OPTIM_EXT_HOST_DEVICE uint8_t encode_positive8(float value, uint8_t exponent, uint32_t random) {
  const int32_t magnitude = static_cast<int32_t>(float_to_bits(value) & kMagnitude);
  const int32_t least = (exponent - kPositiveSpan) << 23;
  const int32_t chosen = (magnitude - least + static_cast<int32_t>(random)) >> kFractionBits;
  const int32_t code = chosen < 1 ? 1 : chosen > 255 ? 255 : chosen;
  return static_cast<uint8_t>(magnitude == 0 ? 0 : code);
}

// Zero by a mask, as GCC makes no packed loop of a second choice.
OPTIM_EXT_HOST_DEVICE float decode_positive8(uint8_t code, uint8_t exponent) {
  const uint32_t number =
      (static_cast<uint32_t>(code) << kFractionBits) + (static_cast<uint32_t>(exponent - kPositiveSpan) << 23);
  const uint32_t finite = number & (0u - static_cast<uint32_t>(code != 0));
  return bits_to_float(exponent == kNotFinite ? 0x7fc00000u : finite);
}

}  // namespace optim_ext
