// Elements of kept parameters and state, from the words that memory holds to what the rule sees and back: the codecs of
// storage/ by what a table says. A word has the bits of one element, whatever its width.
#pragma once

#include "../../storage/kahan.h"
#include "../../storage/master.h"
#include "../../storage/remainder.h"
#include "../../storage/stochastic.h"
#include "block.h"

namespace optim_ext::cuda {

OPTIM_EXT_HOST_DEVICE uint32_t load_one(const void* data, int64_t width, int64_t at) {
  switch (width) {
    case 1: return static_cast<const uint8_t*>(data)[at];
    case 2: return static_cast<const uint16_t*>(data)[at];
    default: return float_to_bits(static_cast<const float*>(data)[at]);
  }
}

OPTIM_EXT_HOST_DEVICE void store_one(void* data, int64_t width, int64_t at, uint32_t word) {
  switch (width) {
    case 1: static_cast<uint8_t*>(data)[at] = static_cast<uint8_t>(word); break;
    case 2: static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(word); break;
    default: static_cast<float*>(data)[at] = bits_to_float(word);
  }
}

// From a word to what the rule sees, and back to nearest.
OPTIM_EXT_HOST_DEVICE float opened(Storage storage, uint32_t word) {
  switch (storage) {
    case Storage::bf16: return widen_bf16(static_cast<uint16_t>(word));
    case Storage::f16: return widen_f16(static_cast<uint16_t>(word));
    default: return bits_to_float(word);
  }
}
OPTIM_EXT_HOST_DEVICE uint32_t closed(Storage storage, float value) {
  switch (storage) {
    case Storage::bf16: return narrow_bf16(value);
    case Storage::f16: return narrow_f16(value);
    default: return float_to_bits(value);
  }
}
OPTIM_EXT_HOST_DEVICE float joined(Precision precision, Storage storage, uint32_t param, uint32_t twin) {
  const bool is_bf16 = storage == Storage::bf16;
  const auto half = static_cast<uint16_t>(param), other = static_cast<uint16_t>(twin);
  switch (precision) {
    case Precision::master:
      return is_bf16 ? healed_bf16(bits_to_float(twin), half) : healed_f16(bits_to_float(twin), half);
    case Precision::remainder: return join_master(half, static_cast<int16_t>(other));
    default: return is_bf16 ? join_compensated_bf16(half, other) : join_compensated_f16(half, other);
  }
}

// The words of a parameter and its twin.
struct SplitWords {
  uint32_t param, twin;
};
OPTIM_EXT_HOST_DEVICE SplitWords split(Precision precision, Storage storage, float value) {
  const bool is_bf16 = storage == Storage::bf16;
  if (precision == Precision::master) return {closed(storage, value), float_to_bits(value)};
  if (precision == Precision::remainder) {
    const SplitMaster master = split_master(value);
    return {master.param, static_cast<uint16_t>(master.remainder)};
  }
  const CompensatedValue pair = is_bf16 ? compensate_bf16(value) : compensate_f16(value);
  return {pair.param, pair.compensation};
}
OPTIM_EXT_HOST_DEVICE int64_t width_of_twin(Precision precision) { return precision == Precision::master ? 4 : 2; }

// What does not lie in order is widened and narrowed once more on its way, as the CPU does: a NaN then is the one that
// conversions make.
OPTIM_EXT_HOST_DEVICE uint32_t moved(Storage storage, uint32_t word) { return closed(storage, opened(storage, word)); }

}  // namespace optim_ext::cuda
