#include "lbfgs_gram.h"

#include <algorithm>

#include "../rules/lbfgs.h"

namespace optim_ext::ops {

// A move costs as much as some hundred products of rows, so it frees an eighth of the room at least.
void LbfgsGram::make_room() {
  if (first_ + count_ < stride_) return;
  const bool is_roomy = first_ > 0 && first_ >= stride_ / 8;
  const int64_t wider = is_roomy ? stride_ : std::max<int64_t>(8, 2 * stride_);
  std::vector<double> sy(wider * wider), yy(wider * wider);
  for (int64_t j = 0; j < count_; ++j) {
    std::copy_n(&sy_[at(j, 0)], count_, &sy[j * wider]);
    std::copy_n(&yy_[at(j, 0)], count_, &yy[j * wider]);
  }
  sy_.swap(sy);
  yy_.swap(yy);
  stride_ = wider;
  first_ = 0;
}

void LbfgsGram::append(const double* y_column, const double* s_column, int64_t step) {
  make_room();
  const int64_t j = count_++;
  for (int64_t i = 0; i <= j; ++i) {
    sy_[at(j, i)] = s_column[i * step];
    yy_[at(j, i)] = yy_[at(i, j)] = y_column[i * step];
  }
}

void LbfgsGram::append(const double* dots) { append(dots, dots + count_ + 1, 1); }

bool LbfgsGram::push(const double* dots, int64_t history_size, double least_curvature) {
  const double *y = dots, *s = y + 2 * (count_ + 1);
  const bool accepted = s[2 * count_ + 1] > least_curvature;
  int64_t dropped = 0;
  if (accepted) {
    if (count_ == history_size) {
      dropped = 1;
      ++first_;
      --count_;
    }
    append(y + 1 + 2 * dropped, s + 1 + 2 * dropped, 2);
  }
  yg_.resize(count_);
  sg_.resize(count_);
  for (int64_t i = 0; i < count_; ++i) {
    yg_[i] = y[2 * (i + dropped)];
    sg_[i] = s[2 * (i + dropped)];
  }
  return accepted;
}

std::vector<double> LbfgsGram::coefficients() {
  std::vector<double> values(1 + 2 * count_);
  alpha_.resize(count_);
  const double* const sy = count_ == 0 ? nullptr : &sy_[at(0, 0)];
  const double* const yy = count_ == 0 ? nullptr : &yy_[at(0, 0)];
  rules::lbfgs_two_loop(count_, stride_, sy, yy, sg_.data(), yg_.data(), h_diag(), values.data(), values.data() + 1,
                        values.data() + 1 + count_, alpha_.data());
  return values;
}

double LbfgsGram::h_diag() const {
  return count_ == 0 ? 1.0 : sy_[at(count_ - 1, count_ - 1)] / yy_[at(count_ - 1, count_ - 1)];
}

}  // namespace optim_ext::ops
