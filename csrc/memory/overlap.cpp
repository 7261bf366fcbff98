#include "overlap.h"

#include <numeric>
#include <utility>

namespace optim_ext::memory {

namespace {

// Two extents share a byte where  sum of coefficient * x = distance  has a solution: an x for every stride, which is
// the place in a dimension of the one less the place in that of the other.
struct Term {
  int64_t coefficient, least, most;  // x lies from least to most
  // What the terms from this one on can add up to, and what divides every such sum.
  int64_t least_sum = 0, most_sum = 0, divisor = 0;
};

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }

// The x in [0, modulus) with factor * x = value, modulo a modulus that has no divisor in common with the factor.
int64_t solve_modulo(int64_t factor, int64_t value, int64_t modulus) {
  int64_t r0 = modulus, r1 = factor % modulus, s0 = 0, s1 = 1;
  while (r1 != 0) {
    const int64_t quotient = r0 / r1;
    r0 = std::exchange(r1, r0 - quotient * r1);
    s0 = std::exchange(s1, s0 - quotient * s1);
  }
  const int64_t inverse = (s0 % modulus + modulus) % modulus, residue = (value % modulus + modulus) % modulus;
  return static_cast<int64_t>(static_cast<__int128>(inverse) * residue % modulus);
}

// Coefficients from the largest to the smallest. The range of what the smaller ones can still add leaves few places to
// try for a larger one (at most two where strides are nested), and of these only every n-th can be right, by division.
class Search {
 public:
  Search(std::vector<Term> terms, int64_t& budget) : terms_(std::move(terms)), budget_(budget) {
    std::stable_sort(terms_.begin(), terms_.end(),
                     [](const Term& a, const Term& b) { return a.coefficient > b.coefficient; });
    std::erase_if(terms_, [](const Term& term) { return term.least == 0 && term.most == 0; });
    size_t kept = 0;
    for (const Term& term : terms_) {
      if (kept > 0 && terms_[kept - 1].coefficient == term.coefficient) {
        terms_[kept - 1].least += term.least;
        terms_[kept - 1].most += term.most;
      } else {
        terms_[kept++] = term;
      }
    }
    terms_.resize(kept);
    Term after{};
    for (size_t k = kept; k-- > 0;) {
      Term& term = terms_[k];
      term.least_sum = after.least_sum + term.coefficient * term.least;
      term.most_sum = after.most_sum + term.coefficient * term.most;
      term.divisor = std::gcd(after.divisor, term.coefficient);
      after = term;
    }
  }

  // Whether the terms from `k` on can add up to `sum`.
  Overlap find(int64_t sum, size_t k = 0) {
    if (k == terms_.size()) return sum == 0 ? Overlap::some : Overlap::none;
    const Term& term = terms_[k];
    if (sum < term.least_sum || sum > term.most_sum || sum % term.divisor != 0) return Overlap::none;
    if (k + 1 == terms_.size()) return Overlap::some;
    const Term& rest = terms_[k + 1];
    const int64_t c = term.coefficient, step = rest.divisor / term.divisor;
    const int64_t most = std::min(term.most, floor_div(sum - rest.least_sum, c));
    int64_t x = std::max(term.least, ceil_div(sum - rest.most_sum, c));
    const int64_t right = solve_modulo(c / term.divisor, sum / term.divisor, step);
    x += ((right - x) % step + step) % step;
    for (; x <= most; x += step) {
      if (--budget_ < 0) return Overlap::unknown;
      const Overlap found = find(sum - c * x, k + 1);
      if (found != Overlap::none) return found;
    }
    return Overlap::none;
  }

 private:
  std::vector<Term> terms_;
  int64_t& budget_;
};

std::vector<Dim> dims_of(const Extent& extent) {
  if (!extent.is_dense()) return extent.dims;
  return {{static_cast<int64_t>(extent.end - extent.begin), 1}};
}

// What divides all strides, and how many bytes lie one behind the other in the last dimension.
int64_t unit_of(const std::vector<Dim>& dims) {
  int64_t unit = dims.back().size;
  for (auto dim = dims.begin(); dim + 1 != dims.end(); ++dim) unit = std::gcd(unit, dim->stride);
  return unit;
}

// Counts in units instead of bytes, so that what divides the strides can rule places out.
void use_unit(std::vector<Dim>& dims, int64_t unit) {
  for (Dim& dim : dims) dim.stride /= unit;
  dims.back() = {dims.back().size / unit, 1};
}

bool is_nested(const std::vector<Dim>& dims) {
  int64_t span = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (dim->stride < span) return false;
    span += (dim->size - 1) * dim->stride;
  }
  return true;
}

}  // namespace

Overlap overlap(const Extent& a, const Extent& b, int64_t& budget) {
  if (!a.meets(b)) return Overlap::none;
  if ((a.is_dense() && b.is_dense()) || a.begin == b.begin) return Overlap::some;
  std::vector<Dim> dims_a = dims_of(a), dims_b = dims_of(b);
  const auto distance = static_cast<int64_t>(b.begin - a.begin);
  const int64_t unit = std::gcd(distance, std::gcd(unit_of(dims_a), unit_of(dims_b)));
  use_unit(dims_a, unit);
  use_unit(dims_b, unit);
  std::vector<Term> terms;
  for (const Dim& dim : dims_a) terms.push_back({dim.stride, 0, dim.size - 1});
  for (const Dim& dim : dims_b) terms.push_back({dim.stride, 1 - dim.size, 0});
  return Search(std::move(terms), budget).find(distance / unit);
}

Overlap overlap_within(const Extent& extent, int64_t& budget) {
  if (is_nested(extent.dims)) return Overlap::none;
  std::vector<Dim> dims = extent.dims;
  use_unit(dims, unit_of(dims));
  // Two places that are the same byte differ in a first dimension, where one of them is further on.
  for (size_t first = 0; first < dims.size(); ++first) {
    if (dims[first].size == 1) continue;
    std::vector<Term> terms{{dims[first].stride, 1, dims[first].size - 1}};
    for (size_t d = first + 1; d < dims.size(); ++d)
      terms.push_back({dims[d].stride, 1 - dims[d].size, dims[d].size - 1});
    const Overlap found = Search(std::move(terms), budget).find(0);
    if (found != Overlap::none) return found;
  }
  return Overlap::none;
}

}  // namespace optim_ext::memory
