// The small dense part of L-BFGS, which lives on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace optim_ext::ops {

// The dot products of a history's rows among themselves, oldest first, kept up from one iteration to the next.
class LbfgsGram {
 public:
  int64_t count() const { return count_; }
  // Adds the newest pair by the dot products of its y with every y and then with every s, its own included: for a
  // history that came from elsewhere.
  void append(const double* dots);
  // Takes those of every y and then of every s, the newest included, with the gradient and the newest y alternately.
  // The pair joins the history, whose oldest one goes when it is full, unless its curvature is too small.
  bool push(const double* dots, int64_t history_size, double least_curvature);
  // Of the gradient, of every y and of every s in the direction, after a push or with an empty history.
  std::vector<double> coefficients();
  // The scale of the initial inverse Hessian: from the newest pair, one without.
  double h_diag() const;
  double curvature(int64_t pair) const { return sy_[at(pair, pair)]; }
  // torch's al of a pair: zero before the first coefficients() of this history.
  double alpha(int64_t pair) const { return static_cast<int64_t>(alpha_.size()) == count_ ? alpha_[pair] : 0.0; }

 private:
  int64_t at(int64_t j, int64_t i) const { return (first_ + j) * stride_ + first_ + i; }
  void append(const double* y_column, const double* s_column, int64_t step);
  void make_room();

  // Pairs are dropped by leaving their row and column behind; the matrices are moved when they have come to the end.
  int64_t first_ = 0, count_ = 0, stride_ = 0;
  std::vector<double> sy_, yy_;  // s_i . y_j and y_i . y_j at (j, i)
  std::vector<double> sg_, yg_, alpha_;
};

}  // namespace optim_ext::ops
