// A float32 master in the 32 bits of a bfloat16 parameter and an int16 beside it, exactly.
//
// The parameter is the master rounded to nearest, ties away from zero: nearest even would give an even bfloat16 65,537
// masters to stand for, one more than 16 bits tell apart. What is left is the distance in units of the master's last
// place, so that one addition of the two gives the master back.
#pragma once

#include "native.h"

namespace optim_ext {

struct SplitMaster {
  uint16_t param;
  int16_t remainder;
};

// What is no NaN.
OPTIM_EXT_HOST_DEVICE SplitMaster split_number(uint32_t bits) {
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16), static_cast<int16_t>(static_cast<uint16_t>(bits))};
}

OPTIM_EXT_HOST_DEVICE SplitMaster split_master(float master) {
  const uint32_t bits = float_to_bits(master);
  const bool is_nan = (bits & kMagnitude) > kInfinity;
  // Rounding up would make a NaN with a large payload a number.
  return split_number(is_nan ? (bits & 0x80000000u) | 0x7fc00000u : bits);
}

OPTIM_EXT_HOST_DEVICE float join_master(uint16_t param, int16_t remainder) {
  return bits_to_float((static_cast<uint32_t>(param) << 16) + static_cast<uint32_t>(static_cast<int32_t>(remainder)));
}

}  // namespace optim_ext
