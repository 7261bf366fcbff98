// The L-BFGS kernels against the CPU's: bit by bit, dot products of bf16 rows excepted, whose lanes the CPU shares out
// differently.
#include <iterator>

#include "../history_cases.h"
#include "place.h"

namespace optim_ext {

namespace {

using namespace history;

void run_on_device(Side& side) {
  const DoublePlace place;
  const cuda::Driver driver(place);
  driver.history_dots(side.dots_task, side.dots.data());
  driver.history_combine(side.combine_task, &side.combined);
  driver.norms(side.norms_task, &side.norms);
}

bool same_norms(const Norms& a, const Norms& b) {
  return same_bits(a.largest, b.largest) && same_bits(a.sum, b.sum) && same_bits(a.product, b.product);
}

void test_shape(const Shape& shape, const Request& request, Storage value, Storage row, Random& random) {
  const Vectors vectors(shape, value, row, random);
  std::vector<double> coefficients;
  for (int64_t i = 0; i < 2 * shape.count; ++i) coefficients.push_back(random.uniform(-1.0, 1.0));
  Side cpu(vectors, shape, request, value, row, coefficients), there(vectors, shape, request, value, row, coefficients);
  cpu.run_on_cpu(kIsa);
  run_on_device(there);
  const auto numel = static_cast<long>(shape.numel), count = static_cast<long>(shape.count);
  for (size_t i = 0; i < cpu.dots.size(); ++i) {
    const double a = cpu.dots[i], b = there.dots[i];
    const bool good = row == Storage::bf16 ? std::abs(a - b) <= 1e-13 * (1.0 + std::abs(a)) : same_bits(a, b);
    check(good, "history %ld x %ld, %s: dot product %zu is %.17g, expected %.17g", count, numel, request.name, i, b, a);
  }
  check(same_norms(cpu.combined, there.combined), "history %ld x %ld, %s: norms of the direction", count, numel,
        request.name);
  check(same_norms(cpu.norms, there.norms), "history %ld x %ld, %s: norms of a vector", count, numel, request.name);
  check(cpu.vectors.d == there.vectors.d, "history %ld x %ld, %s: the direction", count, numel, request.name);
  check(cpu.vectors.y == there.vectors.y && cpu.vectors.s == there.vectors.s, "history %ld x %ld, %s: the rows", count,
        numel, request.name);
}

}  // namespace

void test_history() {
  using enum Storage;
  uint64_t seed = 0;
  for (const int64_t numel : {0, 1, 7, 1023, 1024, 1025, 5000}) {
    for (const int64_t count : {0, 1, 31, 33, 70}) {
      for (const auto& [value, row] : {std::pair{f32, f32}, {f64, f64}, {f32, bf16}, {f64, bf16}}) {
        if (numel == 5000 && count == 70 && row == bf16) continue;
        Random random{++seed};
        device::set_seed(seed);
        find_races(random.one_in(8));
        test_shape({numel, count}, kRequests[random.below(std::size(kRequests))], value, row, random);
      }
    }
  }
}

}  // namespace optim_ext
