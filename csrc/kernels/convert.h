// Widening and narrowing of the 16-bit storage types, in integer arithmetic and selects only: it vectorises at every
// instruction set, needs no F16C, and gives the same bits on the CPU and on a GPU, also when denormals are flushed.
// Narrowing rounds to nearest even.
#pragma once

#include "operand.h"

namespace optim_ext {

OPTIM_EXT_HOST_DEVICE float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
OPTIM_EXT_HOST_DEVICE uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

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

// Element `i` of memory with the given storage, as the value type a rule computes in. (f64 memory is only ever paired
// with V = double, so nothing is lost.)
template <class V>
OPTIM_EXT_HOST_DEVICE V load_element(const void* data, Storage storage, int64_t i) {
  switch (storage) {
    case Storage::f32: return static_cast<V>(static_cast<const float*>(data)[i]);
    case Storage::f64: return static_cast<V>(static_cast<const double*>(data)[i]);
    case Storage::bf16: return static_cast<V>(widen_bf16(static_cast<const uint16_t*>(data)[i]));
    default: return static_cast<V>(widen_f16(static_cast<const uint16_t*>(data)[i]));
  }
}

template <class V>
OPTIM_EXT_HOST_DEVICE void store_element(void* data, Storage storage, int64_t i, V value) {
  switch (storage) {
    case Storage::f32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case Storage::f64: static_cast<double*>(data)[i] = static_cast<double>(value); break;
    case Storage::bf16: static_cast<uint16_t*>(data)[i] = narrow_bf16(static_cast<float>(value)); break;
    default: static_cast<uint16_t*>(data)[i] = narrow_f16(static_cast<float>(value)); break;
  }
}

}  // namespace optim_ext
