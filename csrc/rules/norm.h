#pragma once

#include "rule.h"

namespace optim_ext::rules {

// The second kind of rule: a reduction of one list of tensors. It says what one element contributes (`term`), how two
// contributions become one (`combine`, for which 0 changes nothing) and what the result is (`finish`, which is told how
// many elements there were). All of it is in double, whatever the elements are stored as.
struct Reduction {
  static constexpr int kOperands = 1;
  static constexpr unsigned kUsed = 1, kUpdates = 0;
};

// Sum of magnitudes.
struct L1Norm : Reduction {
  OPTIM_EXT_RULE static double term(double x) { return magnitude(x); }
  OPTIM_EXT_RULE static double combine(double a, double b) { return a + b; }
  OPTIM_EXT_RULE static double finish(double sum, double) { return sum; }
};

// Euclidean norm. The squares of floats neither overflow nor underflow in double.
struct L2Norm : Reduction {
  OPTIM_EXT_RULE static double term(double x) { return x * x; }
  OPTIM_EXT_RULE static double combine(double a, double b) { return a + b; }
  OPTIM_EXT_RULE static double finish(double sum, double) { return root(sum); }
};

// Root of the mean square.
struct RootMeanSquare : Reduction {
  OPTIM_EXT_RULE static double term(double x) { return x * x; }
  OPTIM_EXT_RULE static double combine(double a, double b) { return a + b; }
  OPTIM_EXT_RULE static double finish(double sum, double count) { return root(sum / count); }
};

// Largest magnitude; NaN if any element is.
struct MaxNorm : Reduction {
  OPTIM_EXT_RULE static double term(double x) { return magnitude(x); }
  OPTIM_EXT_RULE static double combine(double a, double b) { return larger(a, b); }
  OPTIM_EXT_RULE static double finish(double largest, double) { return largest; }
};

// How many elements are infinite or NaN.
struct NonFinite : Reduction {
  OPTIM_EXT_RULE static double term(double x) { return x - x == 0.0 ? 0.0 : 1.0; }
  OPTIM_EXT_RULE static double combine(double a, double b) { return a + b; }
  OPTIM_EXT_RULE static double finish(double found, double) { return found; }
};

// What a reduction does with contributions that are combined further.
template <class Rule>
struct Combined : Rule {
  OPTIM_EXT_RULE static double term(double x) { return x; }
};

using SumOfSquares = L2Norm;
using Sum = Combined<SumOfSquares>;

// What a step makes of the norm of its gradients.
struct NormPolicy {
  double max_norm;    // gradients are multiplied by what brings their norm down to it, as torch's clip_grad_norm_ does
  double skip_above;  // no step unless the norm is at most this
  bool clips, skips_nonfinite, skips_above;
  bool in_double;  // the norm is reported as a double; else it is rounded to float, and the rounded one counts
};

struct NormVerdict {
  double norm, grad_factor;
  bool skip;
};

// `norm` is that of the gradients as they are in memory, which are `grad_scale` times what they stand for; `found_inf`
// is what GradScaler found.
OPTIM_EXT_RULE NormVerdict judge(const NormPolicy& policy, double norm, double grad_scale, bool found_inf) {
  const double unscaled = norm / grad_scale;
  NormVerdict verdict{policy.in_double ? unscaled : static_cast<double>(static_cast<float>(unscaled)), 1.0, found_inf};
  if (policy.clips) {
    const double factor = policy.max_norm / (verdict.norm + 1e-6);
    verdict.grad_factor = factor > 1.0 ? 1.0 : factor;  // stays NaN
  }
  verdict.skip |= policy.skips_nonfinite && verdict.norm - verdict.norm != 0.0;
  verdict.skip |= policy.skips_above && !(verdict.norm <= policy.skip_above);
  return verdict;
}

}  // namespace optim_ext::rules
