// A 16-bit parameter and what its rounding has lost, in the same type: the rule works on their sum.
#pragma once

#include "half.h"

namespace optim_ext {

struct CompensatedValue {
  uint16_t param, compensation;
};

OPTIM_EXT_HOST_DEVICE float join_compensated_bf16(uint16_t param, uint16_t compensation) {
  return widen_bf16(param) + widen_bf16(compensation);
}
OPTIM_EXT_HOST_DEVICE float join_compensated_f16(uint16_t param, uint16_t compensation) {
  return widen_f16(param) + widen_f16(compensation);
}

// Nothing is lost of an infinity or NaN: their difference would turn an infinity into NaN at the next step.
OPTIM_EXT_HOST_DEVICE CompensatedValue compensate_bf16(float value) {
  const uint16_t param = narrow_bf16(value);
  const float lost = value - widen_bf16(param);
  const bool is_finite = (param & 0x7fffu) < 0x7f80u;
  return {param, narrow_bf16(is_finite ? lost : 0.0f)};
}
OPTIM_EXT_HOST_DEVICE CompensatedValue compensate_f16(float value) {
  const uint16_t param = narrow_f16(value);
  const float lost = value - widen_f16(param);
  const bool is_finite = (param & 0x7fffu) < 0x7c00u;
  return {param, narrow_f16(is_finite ? lost : 0.0f)};
}

}  // namespace optim_ext
