#pragma once

#include "norm.h"
#include "rule.h"

namespace optim_ext::rules {

// Adafactor (Shazeer & Stern 2018) in torch.optim's form. Of a matrix it keeps the mean squares of rows and of columns,
// whose product over the mean of the first stands for the second moment; of a vector the second moment itself.

// A running average: of mean squares of rows or columns, or, if kSquares, of the squares of a vector's gradient.
template <bool kSquares>
struct AdafactorAverage {
  static constexpr int kOperands = 2;  // average, what is averaged
  static constexpr unsigned kUsed = all_operands(2);
  static constexpr unsigned kUpdates = operand_bit(0);

  double beta2_decay;
  double weight;  // filled in by at_step

  OPTIM_EXT_RULE AdafactorAverage at_step(double step) const {
    AdafactorAverage rule = *this;
    rule.weight = real_power(step, beta2_decay);
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& average, V latest) const {
    average = lerp(average, kSquares ? latest * latest : latest, V(weight));
  }
};

// One over the root of the second moment of a matrix, as a factor for each row times a factor for each column: so an
// element needs neither division nor root.
template <bool kRows>
struct AdafactorFactor {
  static constexpr int kOperands = 3;  // factor (written only), row_var or col_var, mean of row_var
  static constexpr unsigned kUsed = all_operands(2) | operand_bit_if(kRows, 2);
  static constexpr unsigned kUpdates = operand_bit(0);

  double eps1;

  OPTIM_EXT_RULE AdafactorFactor at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& factor, V var, V mean) const {
    const V scale = kRows ? (mean < V(eps1) ? V(eps1) : mean) : V(1);  // stays NaN
    factor = root(scale / var);
  }
};

// What the gradient is multiplied by, no more than `largest`; NaN stays NaN. `first` is the factor of the row and
// `second` that of the column, or `first` is a vector's variance.
template <bool kFactored, class V>
OPTIM_EXT_RULE V adafactor_scale(V first, V second, V largest) {
  const V scale = kFactored ? first * second : V(1) / root(first);
  return scale > largest ? largest : scale;
}

// Root mean square of the update before it is clipped.
template <bool kFactored>
struct AdafactorRms : Reduction {
  static constexpr int kOperands = 4;  // grad, largest scale, row factor or variance, column factor
  static constexpr unsigned kUsed = all_operands(3) | operand_bit_if(kFactored, 3);

  OPTIM_EXT_RULE static double term(double grad, double largest, double first, double second) {
    return RootMeanSquare::term(grad * adafactor_scale<kFactored>(first, second, largest));
  }
  OPTIM_EXT_RULE static double combine(double a, double b) { return a + b; }
  OPTIM_EXT_RULE static double finish(double sum, double count) { return RootMeanSquare::finish(sum, count); }
};

template <bool kFactored>
struct AdafactorUpdate {
  static constexpr int kOperands = 4;  // param, grad, row factor or variance, column factor
  static constexpr unsigned kUsed = all_operands(3) | operand_bit_if(kFactored, 3);
  static constexpr unsigned kUpdates = operand_bit(0);
  static constexpr int kScalars = 2;  // root mean squares of param and of the update
  static constexpr bool kMeasured = true;

  double lr, eps1, eps2, d, weight_decay;
  bool maximize;
  double step_size, largest;  // filled in by at_step

  OPTIM_EXT_RULE AdafactorUpdate at_step(double step, Scalar* rms) const {
    AdafactorUpdate rule = *this;
    const double decayed = 1.0 / root(step), clipped = rms[1].value / d;
    const double relative = rms[0].value > eps2 ? rms[0].value : eps2;  // as Python's max(), which drops a NaN
    const double alpha = relative * (decayed < lr ? decayed : lr);
    rule.step_size = (maximize ? -alpha : alpha) / (clipped > 1.0 ? clipped : 1.0);
    rule.largest = 1.0 / eps1;
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V first, V second) const {
    const V update = grad * adafactor_scale<kFactored>(first, second, V(largest));
    // A rate may be infinite: then it does not limit the step, which is relative.
    const double kept = weight_decay != 0.0 ? 1.0 - lr * weight_decay : 1.0;
    param = V(kept) * param - V(step_size) * update;
  }
};

}  // namespace optim_ext::rules
