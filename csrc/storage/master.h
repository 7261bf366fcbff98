// A float32 master beside a 16-bit parameter, which is the master rounded to nearest even.
#pragma once

#include "half.h"

namespace optim_ext {

// The master that a step goes on from: a parameter that is not its master rounded has been written by somebody else,
// and what he wrote counts.
OPTIM_EXT_HOST_DEVICE float healed_bf16(float master, uint16_t param) {
  return narrow_bf16(master) == param ? master : widen_bf16(param);
}
OPTIM_EXT_HOST_DEVICE float healed_f16(float master, uint16_t param) {
  return narrow_f16(master) == param ? master : widen_f16(param);
}

}  // namespace optim_ext
