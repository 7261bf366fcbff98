// The 16-bit floating point types. Widening is exact, narrowing rounds to nearest even, in integer arithmetic and
// selects only: it vectorises at every instruction set, needs no F16C, and gives the same bits on the CPU and on a GPU,
// also when denormals are flushed.
#pragma once

#include "native.h"

namespace optim_ext {

OPTIM_EXT_HOST_DEVICE float widen_bf16(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

OPTIM_EXT_HOST_DEVICE uint16_t narrow_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

OPTIM_EXT_HOST_DEVICE float widen_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rebias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // inf and NaN keep an all-ones exponent
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = float_to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bits_to_float((magnitude < 0x0400u ? subnormal : normal) | sign);
}

OPTIM_EXT_HOST_DEVICE uint16_t narrow_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 moves the last bit of a half's subnormal to the last bit of the sum, which is rounded there.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | sign);
}

}  // namespace optim_ext
