#pragma once

#include "norm.h"
#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Adafactor (Shazeer & Stern 2018) in torch.optim's form. Of a matrix it keeps the mean squares of rows and of columns,
// whose product over the mean of the first stands for the second moment; of a vector the second moment itself.

// The options of a step. What at_step makes of them is not computed with here but told by: where torch divides by zero
// or overflows, one of the two is not finite.
struct Adafactor {
  double lr, beta2_decay, eps1, eps2, d, weight_decay;
  bool maximize;
  double average_weight, per_d;  // filled in by at_step

  static constexpr List kLists[] = {params(),
                                    grads(),
                                    partial("row_vars", "row_var"),
                                    partial("col_vars", "col_var"),
                                    partial("variances", "variance"),
                                    steps()};
  static constexpr Field<Adafactor> kFields[] = {tensor_or(number("lr", &Adafactor::lr)),
                                                 number("beta2_decay", &Adafactor::beta2_decay),
                                                 number("eps1", &Adafactor::eps1, "eps", 0),
                                                 number("eps2", &Adafactor::eps2, "eps", 1),
                                                 number("d", &Adafactor::d),
                                                 number("weight_decay", &Adafactor::weight_decay),
                                                 flag("maximize", &Adafactor::maximize)};
  static constexpr Derived<Adafactor> kDerived[] = {
      strictly(finite("the weight of the averages", &Adafactor::average_weight, &Adafactor::beta2_decay)),
      finite("the inverse of the clipping threshold", &Adafactor::per_d, &Adafactor::d)};

  OPTIM_EXT_RULE Adafactor at_step(double step) const {
    Adafactor options = *this;
    // A weight above one makes averages of squares negative, whose roots the factored moment is made of.
    const double weight = real_power(step, beta2_decay);
    options.average_weight = weight > 1.0 ? __builtin_nan("") : weight;
    options.per_d = 1.0 / d;
    return options;
  }

  // What no element of a gradient is multiplied by more than.
  OPTIM_EXT_RULE double largest_scale() const { return 1.0 / magnitude(eps1); }
};

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

  Adafactor options;
  double step_size, largest;  // filled in by at_step

  OPTIM_EXT_RULE AdafactorUpdate at_step(double step, Scalar* rms) const {
    AdafactorUpdate rule = *this;
    const double decayed = 1.0 / root(step), clipped = rms[1].value / options.d;
    const double least = options.eps2;
    const double relative = rms[0].value > least ? rms[0].value : least;  // as Python's max(), which drops a NaN
    const double alpha = relative * (decayed < options.lr ? decayed : options.lr);
    rule.step_size = (options.maximize ? -alpha : alpha) / (clipped > 1.0 ? clipped : 1.0);
    rule.largest = options.largest_scale();
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V first, V second) const {
    const V update = grad * adafactor_scale<kFactored>(first, second, V(largest));
    // A rate may be infinite: then it does not limit the step, which is relative.
    const double kept = options.weight_decay != 0.0 ? shrinkage(options.lr, options.weight_decay) : 1.0;
    param = V(kept) * param - V(step_size) * update;
  }
};

}  // namespace optim_ext::rules
