// The vocabulary of a rule. Every formula in this folder is written with these few words and plain arithmetic, so that
// one text compiles for every CPU instruction set and for CUDA, and gives the same bits on each of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define OPTIM_EXT_RULE __host__ __device__ __forceinline__
#else
// Always inlined, never emitted: a rule compiled for AVX-512 must not leave a symbol that a baseline caller could link.
#define OPTIM_EXT_RULE inline __attribute__((always_inline))
#endif

namespace optim_ext::rules {

// A rule is a struct of double hyper-parameters with
//   kOperands  how many tensors one parameter brings: param, grad, then its state, in the order of the call operator;
//   kUsed      bit i set: operand i exists for this variant (absent ones are passed as scratch and optimised away);
//   kUpdates   bit i set: operand i is written;
//   at_step    the same rule with what depends on the step count (bias corrections, decayed rates) filled in;
//   kScalars   only where the state of a parameter has numbers besides its step count: how many. at_step then takes
//              them as a second argument, and leaves in them what they are after the step;
//   kMeasured  true where these numbers are no state but were measured before, such as norms: at_step only reads them;
//   operator() the update of one element, V being float or double.
constexpr unsigned operand_bit(int i) { return 1u << i; }
constexpr unsigned operand_bit_if(bool present, int i) { return present ? operand_bit(i) : 0u; }
constexpr unsigned all_operands(int n) { return (1u << n) - 1u; }

// A number of a parameter's state, and whether its tensor holds a double.
struct Scalar {
  double value;
  bool is_double;
};

// What torch has computed in float, or in double: later steps depend on every bit of a state.
OPTIM_EXT_RULE double rounded(double x, bool in_double) {
  return in_double ? x : static_cast<double>(static_cast<float>(x));
}

template <class Rule>
constexpr int kScalarsOf = [] {
  if constexpr (requires { Rule::kScalars; }) {
    return Rule::kScalars;
  } else {
    return 0;
  }
}();

// Whether they are to be stored after the step.
template <class Rule>
constexpr bool kStoresScalars = kScalarsOf<Rule> > 0 && !requires { requires Rule::kMeasured; };

// Square root, correctly rounded on every target.
OPTIM_EXT_RULE float root(float x) { return __builtin_sqrtf(x); }
OPTIM_EXT_RULE double root(double x) { return __builtin_sqrt(x); }

OPTIM_EXT_RULE float magnitude(float x) { return __builtin_fabsf(x); }
OPTIM_EXT_RULE double magnitude(double x) { return __builtin_fabs(x); }

// 1, 0 or -1, and 0 for NaN, as torch.sign.
template <class V>
OPTIM_EXT_RULE V sign(V x) {
  const V negative_or_none = x < V(0) ? V(-1) : V(0);
  return x > V(0) ? V(1) : negative_or_none;
}

// The larger of two values; NaN if either is NaN, as torch.maximum.
template <class V>
OPTIM_EXT_RULE V larger(V a, V b) {
  const V larger_or_b = a > b ? a : b;  // b also where one of them is NaN; two selects, as `||` would not vectorise
  return a != a ? a : larger_or_b;
}

// `x`, or the largest finite value where it has overflowed: what is subtracted from an infinity then leaves infinity,
// not NaN. (torch gets there by a fused multiply-add, which has no overflow in between.)
OPTIM_EXT_RULE float finite(float x) { return x > __FLT_MAX__ ? __FLT_MAX__ : x; }
OPTIM_EXT_RULE double finite(double x) { return x > __DBL_MAX__ ? __DBL_MAX__ : x; }

// Linear interpolation from `start` towards `end`, rounding as torch.lerp does: from the nearer end.
template <class V>
OPTIM_EXT_RULE V lerp(V start, V end, V weight) {
  const V base = weight < V(0.5) ? start : end;
  const V step = weight < V(0.5) ? weight : weight - V(1);
  return base + step * (end - start);
}

// base ** count for a step count. Counts are whole numbers, so the power is a fixed sequence of multiplications that
// rounds alike on the CPU and on a GPU, which the two math libraries' pow() does not promise.
OPTIM_EXT_RULE double power(double base, double count) {
  double result = 1.0;
  for (uint64_t n = count > 0.0 ? static_cast<uint64_t>(count) : 0; n != 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// base ** exponent to a few units in the last place, in arithmetic that rounds alike on the CPU and on a GPU. NaN where
// it is no real number; 0 to a negative power, which a caller divides by, is 0.
OPTIM_EXT_RULE double real_power(double base, double exponent) {
  double sign = 1.0;
  if (base < 0.0) {
    const bool is_large = magnitude(exponent) >= 0x1p53;  // then it is an even number
    const int64_t whole = is_large ? 0 : static_cast<int64_t>(exponent);
    base = -base;
    if (whole % 2 != 0) sign = -1.0;
    if (!is_large && static_cast<double>(whole) != exponent) {
      if (base <= 1.7e308) return __builtin_nan("");
      sign = 1.0;
    }
  }
  if (!(base > 0.0) || exponent == 0.0) return exponent == 0.0 ? 1.0 : base;
  if (base > 1.7e308) return exponent > 0.0 ? sign * base : 0.0;
  // log(base) = shift * log(2) + log(m), m in [sqrt(1/2), sqrt(2)), by the series of atanh.
  const uint64_t bits = __builtin_bit_cast(uint64_t, base < 2.3e-308 ? base * 0x1p54 : base);
  double shift = static_cast<double>(static_cast<int>(bits >> 52) - 1023 - (base < 2.3e-308 ? 54 : 0));
  double m = __builtin_bit_cast(double, (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    shift += 1.0;
  }
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double series = 0.0;
  for (int k = 25; k >= 3; k -= 2) series = (series + 1.0 / k) * s2;
  const double log_m = 2.0 * s + 2.0 * s * series;
  const double y = exponent * (shift * 0.6931471805599453 + log_m);
  if (y > 709.0 || y < -708.0) return y > 0.0 ? sign * __builtin_inf() : 0.0;
  // exp(y) = 2 ** n * exp(r), |r| <= log(2) / 2, log(2) in two parts so that r keeps its last bits.
  const double scaled = y * 1.4426950408889634;
  const double n = static_cast<double>(static_cast<int64_t>(scaled + (scaled < 0.0 ? -0.5 : 0.5)));
  const double r = (y - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double sum = 1.0;
  for (int k = 14; k >= 1; --k) sum = 1.0 + sum * r / k;
  return sign * sum * __builtin_bit_cast(double, static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// The gradient a rule starts from: turned around for `maximize`, with L2 regularisation added. A weight_decay of zero
// adds nothing even where the parameter is infinite or NaN, as in torch.
template <class V>
OPTIM_EXT_RULE V regularized(V grad, V param, bool maximize, V weight_decay) {
  const V ascent = grad * (maximize ? V(-1) : V(1));
  return weight_decay != V(0) ? ascent + weight_decay * param : ascent;
}

// Decoupled weight decay: what a step leaves of a parameter.
OPTIM_EXT_RULE double shrinkage(double lr, double weight_decay) { return 1.0 - lr * weight_decay; }

}  // namespace optim_ext::rules
