// The ops of L-BFGS, as library.cpp registers them, and the small dense part of the method, which lives on the host.
#pragma once

#include <vector>

#include "ops.h"

namespace optim_ext::ops {

// Copies tensors one after the other, in their logical order, into `flat`, each at its offset; zeros in between.
template <class Driver>
void lbfgs_gather_(const Tensor& flat, TensorList tensors, at::IntArrayRef offsets, bool negate);

// Moves the parameters t along d, from `origin` or from where they are.
template <class Driver>
void lbfgs_displace_(TensorList params, const Tensor& d, const OptionalTensor& origin, double t);

// (largest magnitude, sum of magnitudes, product with `other`), in double.
template <class Driver>
Tensor lbfgs_norms(const Tensor& vector, const OptionalTensor& other);

// Dot products with every row of old_dirs, then of old_stps. `metric` multiplies the old_dirs rows.
template <class Driver>
Tensor lbfgs_dots(const Tensor& vector, TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric);

// Makes the pair y = grad_weight grad - prev_weight prev_grad, s = t d, where y may be the memory of prev_grad and s
// that of d, and returns the dot products of every row of old_dirs and y, then of old_stps and s, with (grad, y)
// alternately.
template <class Driver>
Tensor lbfgs_pair_(const Tensor& y, const Tensor& s, const Tensor& grad, const Tensor& prev_grad, const Tensor& d,
                   TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric, double t, double grad_weight,
                   double prev_weight);

// Writes the direction that `coefficients` (of grad, old_dirs, old_stps) make; returns d's norms, and grad . d.
template <class Driver>
Tensor lbfgs_combine_(const Tensor& d, const Tensor& grad, TensorList old_dirs, TensorList old_stps,
                      const Tensor& coefficients, const OptionalTensor& metric);

// The dot products of a history's rows among themselves, oldest first, kept up from one iteration to the next.
class LbfgsGram {
 public:
  int64_t count() const { return count_; }
  // Adds the newest pair by lbfgs_dots of its y with all rows, itself included: for a history that came from elsewhere.
  void append_dots(const Tensor& dots);
  // Takes what lbfgs_pair_ returned. The pair joins the history, whose oldest one goes when it is full, unless its
  // curvature is too small.
  bool push(const Tensor& dots, int64_t history_size, double least_curvature);
  // For lbfgs_combine_, after a push.
  Tensor coefficients();
  // The scale of the initial inverse Hessian: from the newest pair, one without.
  double h_diag() const;
  std::vector<double> curvatures() const;
  const std::vector<double>& alpha() const { return alpha_; }

 private:
  void append(const double* y_column, const double* s_column, int64_t stride);
  void drop_oldest();

  int64_t count_ = 0, stride_ = 0;
  std::vector<double> sy_, yy_;  // s_i . y_j and y_i . y_j at [j][i]
  std::vector<double> sg_, yg_, alpha_;
};

}  // namespace optim_ext::ops
