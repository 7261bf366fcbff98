// The ops of L-BFGS, as library.cpp registers them.
#pragma once

#include "ops.h"

namespace optim_ext::ops {

// Copies tensors one after the other, in their logical order, into `flat`, each at its offset; zeros in between.
template <class Driver>
void lbfgs_gather_(const Tensor& flat, TensorList tensors, at::IntArrayRef offsets, bool negate);

// Moves the parameters t along d, from `origin` or from where they are.
template <class Driver>
void lbfgs_displace_(TensorList params, const Tensor& d, const OptionalTensor& origin, double t);

// (largest magnitude, sum of magnitudes, product with `other`), in double. Here and below, sums are of the first
// `counted` elements, where given: a multiple of 1024, or all.
template <class Driver>
Tensor lbfgs_norms(const Tensor& vector, const OptionalTensor& other, std::optional<int64_t> counted);

// Dot products with every row of old_dirs, then of old_stps. `metric` multiplies the old_dirs rows.
template <class Driver>
Tensor lbfgs_dots(const Tensor& vector, TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric,
                  std::optional<int64_t> counted);

// Makes the pair y = grad_weight grad - prev_weight prev_grad, s = t d, where y may be the memory of prev_grad and s
// that of d, and returns the dot products of every row of old_dirs and y, then of old_stps and s, with (grad, y)
// alternately.
template <class Driver>
Tensor lbfgs_pair_(const Tensor& y, const Tensor& s, const Tensor& grad, const Tensor& prev_grad, const Tensor& d,
                   TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric, double t, double grad_weight,
                   double prev_weight, std::optional<int64_t> counted);

// Writes the direction that `coefficients` (of grad, old_dirs, old_stps) make; returns d's norms, and grad . d.
template <class Driver>
Tensor lbfgs_combine_(const Tensor& d, const Tensor& grad, TensorList old_dirs, TensorList old_stps,
                      const Tensor& coefficients, const OptionalTensor& metric, std::optional<int64_t> counted);

}  // namespace optim_ext::ops
