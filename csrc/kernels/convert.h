// Elements of memory as the values a rule computes in.
#pragma once

#include "../storage/half.h"
#include "operand.h"

namespace optim_ext {

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
