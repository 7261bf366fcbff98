// Words of rules written in Python (optim_ext/_rules) besides those of rule.h: plain arithmetic in a fixed order, so
// that they give the same bits on every instruction set and on a GPU.
#pragma once

#include "rule.h"

namespace optim_ext::rules {

// The smaller of two values; NaN if either is NaN, as torch.minimum.
template <class V>
OPTIM_EXT_RULE V smaller(V a, V b) {
  const V smaller_or_b = a < b ? a : b;
  return a != a ? a : smaller_or_b;
}

// base ** count for whole numbers of either sign.
OPTIM_EXT_RULE double whole_power(double base, double count) {
  return count < 0.0 ? 1.0 / power(base, -count) : power(base, count);
}

// e ** x to a few units in the last place; 0 where that would be below the normal numbers of a double. No branch, and
// no conversion that a register of the oldest instruction set cannot do.
OPTIM_EXT_RULE double exponential(double x) {
  constexpr double kToWhole = 0x1.8p52;  // a sum with it has a whole number in its last bits
  const double shifted = x * 1.4426950408889634 + kToWhole;
  const double n = shifted - kToWhole;
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double sum = 1.0;
#if !defined(__CUDACC__)
#pragma GCC unroll 16
#endif
  for (int k = 14; k >= 1; --k) sum = 1.0 + sum * r * (1.0 / k);
  const uint64_t scale = (__builtin_bit_cast(uint64_t, shifted) + 1022) << 52;
  const double value = sum * __builtin_bit_cast(double, scale) * 2.0;
  const double above = x > 709.782712893384 ? static_cast<double>(__builtin_inf()) : value;
  return x < -708.0 ? 0.0 : above;
}
OPTIM_EXT_RULE float exponential(float x) { return static_cast<float>(exponential(static_cast<double>(x))); }

// The natural logarithm to a few units in the last place.
OPTIM_EXT_RULE double logarithm(double x) {
  const bool is_small = x < 2.3e-308;
  const uint64_t bits = __builtin_bit_cast(uint64_t, is_small ? x * 0x1p54 : x);
  // x = 2 ** shift * m with m in [sqrt(1/2), sqrt(2)), and log(m) by the series of atanh.
  const double exponent = __builtin_bit_cast(double, (bits >> 52) | 0x4330000000000000ull) - 0x1p52;
  const double wide = __builtin_bit_cast(double, (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  const bool is_wide = wide > 1.4142135623730951;
  const double m = is_wide ? 0.5 * wide : wide;
  const double shift = exponent - (is_small ? 1077.0 : 1023.0) + (is_wide ? 1.0 : 0.0);
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double series = 0.0;
#if !defined(__CUDACC__)
#pragma GCC unroll 16
#endif
  for (int k = 25; k >= 3; k -= 2) series = (series + 1.0 / k) * s2;
  const double value = shift * 0x1.62e42fee00000p-1 + (shift * 0x1.a39ef35793c76p-33 + (2.0 * s + 2.0 * s * series));
  const double above_zero = x > 1.7976931348623157e308 ? x : value;
  const double from_zero = x == 0.0 ? -static_cast<double>(__builtin_inf()) : above_zero;
  return x >= 0.0 ? from_zero : static_cast<double>(__builtin_nan(""));
}
OPTIM_EXT_RULE float logarithm(float x) { return static_cast<float>(logarithm(static_cast<double>(x))); }

}  // namespace optim_ext::rules
