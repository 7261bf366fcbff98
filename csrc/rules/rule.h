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
//   operator() the update of one element, V being float or double.
constexpr unsigned operand_bit(int i) { return 1u << i; }
constexpr unsigned operand_bit_if(bool present, int i) { return present ? operand_bit(i) : 0u; }
constexpr unsigned all_operands(int n) { return (1u << n) - 1u; }

// Square root, correctly rounded on every target.
OPTIM_EXT_RULE float root(float x) { return __builtin_sqrtf(x); }
OPTIM_EXT_RULE double root(double x) { return __builtin_sqrt(x); }

OPTIM_EXT_RULE double magnitude(double x) { return __builtin_fabs(x); }

// The larger of two values; NaN if either is NaN, as torch.maximum.
template <class V>
OPTIM_EXT_RULE V larger(V a, V b) {
  const V larger_or_b = a > b ? a : b;  // b also where one of them is NaN; two selects, as `||` would not vectorise
  return a != a ? a : larger_or_b;
}

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

// The gradient a rule starts from: turned around for `maximize`, with L2 regularisation added. A weight_decay of zero
// adds nothing even where the parameter is infinite or NaN, as in torch.
template <class V>
OPTIM_EXT_RULE V regularized(V grad, V param, bool maximize, V weight_decay) {
  const V ascent = grad * (maximize ? V(-1) : V(1));
  return weight_decay != V(0) ? ascent + weight_decay * param : ascent;
}

}  // namespace optim_ext::rules
