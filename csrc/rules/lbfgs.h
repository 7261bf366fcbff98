#pragma once

#include "rule.h"

namespace optim_ext::rules {

// The moves between many parameters and the one flat vector L-BFGS works on. A copy of one parameter's gradient:
struct Flatten {
  static constexpr int kOperands = 2;  // flat, source
  static constexpr unsigned kUsed = all_operands(2);
  static constexpr unsigned kUpdates = operand_bit(0);

  bool negate;

  OPTIM_EXT_RULE Flatten at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& flat, V source) const {
    flat = source * (negate ? V(-1) : V(1));
  }
};

// A step of length t along the direction d, from the parameter itself or from a point kept elsewhere.
template <bool kFromOrigin>
struct Displace {
  static constexpr int kOperands = 3;  // param, d, origin
  static constexpr unsigned kUsed = all_operands(2) | operand_bit_if(kFromOrigin, 2);
  static constexpr unsigned kUpdates = operand_bit(0);

  double t;

  OPTIM_EXT_RULE Displace at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V d, V origin) const {
    param = (kFromOrigin ? origin : param) + V(t) * d;
  }
};

// The pair an iteration adds to the history: the step taken and the change of the gradient along it. Both replace what
// they are made from. The weights are one but for a damped pair (Powell 1978), which mixes in B s = -t prev_grad.
struct LbfgsPair {
  double t, grad_weight, prev_weight;

  template <class V>
  OPTIM_EXT_RULE void operator()(V grad, V& prev_grad_to_y, V& d_to_s) const {
    prev_grad_to_y = V(grad_weight) * grad - V(prev_weight) * prev_grad_to_y;
    d_to_s = d_to_s * V(t);
  }
};

// The two-loop recursion (Nocedal 1980) carried out on coefficients instead of vectors (as Byrd, Nocedal & Schnabel
// 1994 show it can be): d = grad_coefficient * g + sum_i y_coefficient[i] y_i + sum_i s_coefficient[i] s_i = -H g. All
// it needs of the vectors are their dot products, oldest pair first:
//   sy[j * stride + i] = s_i . y_j for i <= j;  yy[j * stride + i] = y_i . y_j;  sg[i] = s_i . g;  yg[i] = y_i . g.
// `h_diag` scales the initial inverse Hessian. `alpha` receives torch's al; `y_coefficient` doubles as scratch.
OPTIM_EXT_RULE void lbfgs_two_loop(int64_t count, int64_t stride, const double* sy, const double* yy, const double* sg,
                                   const double* yg, double h_diag, double* grad_coefficient, double* y_coefficient,
                                   double* s_coefficient, double* alpha) {
  for (int64_t i = 0; i < count; ++i) alpha[i] = -sg[i];
  for (int64_t j = count - 1; j >= 0; --j) {
    alpha[j] = alpha[j] / sy[j * stride + j];
    for (int64_t i = 0; i < j; ++i) alpha[i] -= alpha[j] * sy[j * stride + i];
  }
  double* const y_dot_q = y_coefficient;
  for (int64_t i = 0; i < count; ++i) y_dot_q[i] = -yg[i];
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < count; ++i) y_dot_q[i] -= alpha[j] * yy[j * stride + i];
  }
  // Some rows at a time, as each is a sum whose additions wait for one another.
  constexpr int64_t kRows = 8;
  for (int64_t first = 0; first < count; first += kRows) {
    const int64_t rows = count - first < kRows ? count - first : kRows;
    double y_dot_r[kRows];
    for (int64_t r = 0; r < rows; ++r) y_dot_r[r] = h_diag * y_dot_q[first + r];
    for (int64_t j = 0; j < first; ++j) {
      for (int64_t r = 0; r < rows; ++r) y_dot_r[r] += s_coefficient[j] * sy[(first + r) * stride + j];
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      for (int64_t j = first; j < i; ++j) y_dot_r[r] += s_coefficient[j] * sy[i * stride + j];
      s_coefficient[i] = alpha[i] - y_dot_r[r] / sy[i * stride + i];
    }
  }
  for (int64_t i = 0; i < count; ++i) y_coefficient[i] = -h_diag * alpha[i];
  *grad_coefficient = -h_diag;
}

}  // namespace optim_ext::rules
