// What memory is made of: the storage types a kernel reads and writes as they are. The room of codecs: each says how a
// number that its own storage has no room for is kept in memory, for one element or one block, in integer arithmetic
// and selects, so that every instruction set and every device gets the same bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define OPTIM_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define OPTIM_EXT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace optim_ext {

enum class Storage : uint8_t { f32, f64, bf16, f16, q8 };  // q8: codes in blocks (block8.h)

OPTIM_EXT_HOST_DEVICE int64_t bytes_of(Storage s) {
  return s == Storage::f64 ? 8 : s == Storage::f32 ? 4 : s == Storage::q8 ? 1 : 2;
}

OPTIM_EXT_HOST_DEVICE float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
OPTIM_EXT_HOST_DEVICE uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;  // of the bits of a float

}  // namespace optim_ext
