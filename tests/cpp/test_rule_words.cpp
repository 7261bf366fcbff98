// The vocabulary of the rules (rules/rule.h): larger, lerp, power, regularized, root.
#include <cmath>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "rules/rule.h"

using namespace optim_ext::rules;

namespace {

template <class V>
void test_larger() {
  const V nan = std::numeric_limits<V>::quiet_NaN(), inf = std::numeric_limits<V>::infinity();
  const V values[] = {-inf, V(-2), V(0), V(3), inf};
  for (const V a : values) {
    for (const V b : values) check(larger(a, b) == (a < b ? b : a), "larger(%g, %g)", double(a), double(b));
    check(std::isnan(larger(a, nan)) && std::isnan(larger(nan, a)), "larger(%g, NaN)", double(a));
  }
}

template <class V>
void test_lerp() {
  Random random{1};
  const V unit = std::numeric_limits<V>::epsilon();
  for (int i = 0; i < 10000; ++i) {
    const V start = V(random.uniform(-2, 2)), end = V(random.uniform(-2, 2)), weight = V(random.uniform(0, 1));
    const long double exact = start + static_cast<long double>(weight) * (static_cast<long double>(end) - start);
    const V got = lerp(start, end, weight);
    check(std::fabs(static_cast<double>(got - exact)) <= 8 * unit, "lerp(%g, %g, %g) = %g", double(start), double(end),
          double(weight), double(got));
  }
  // From the nearer end, so both ends are met exactly, as a plain start + weight * (end - start) does not.
  check(lerp(V(1e8), V(0.1), V(1)) == V(0.1), "lerp with weight 1 is not the end");
  check(lerp(V(0.1), V(1e8), V(0)) == V(0.1), "lerp with weight 0 is not the start");
  check(lerp(V(3), V(5), V(0.25)) == V(3.5) && lerp(V(3), V(5), V(0.75)) == V(4.5), "lerp between 3 and 5");
}

void test_power() {
  for (const double base : {0.0, 0.5, 0.9, 0.999, 1.0, 1.5, -0.5}) {
    for (int count = 0; count <= 64; ++count) {
      long double exact = 1.0L;
      for (int i = 0; i < count; ++i) exact *= base;
      const double got = power(base, count);
      check(std::fabs(static_cast<double>(got - exact)) <= 32 * 0x1p-52 * std::fabs(static_cast<double>(exact)),
            "power(%g, %d) = %.17g", base, count, got);
    }
  }
  check(power(0.5, 1000) == std::ldexp(1.0, -1000), "power(0.5, 1000)");
  check(std::fabs(power(0.9999, 1e5) / std::pow(0.9999, 1e5) - 1.0) < 1e-10, "power(0.9999, 1e5)");
  check(power(0.9, 1e15) == 0.0, "power(0.9, 1e15) does not vanish");
  check(power(0.9, 0.0) == 1.0 && power(0.9, -3.0) == 1.0, "power with a count below one");
}

template <class V>
void test_regularized() {
  const V inf = std::numeric_limits<V>::infinity();
  check(regularized(V(2), V(3), false, V(0.5)) == V(3.5), "weight decay");
  check(regularized(V(2), V(3), true, V(0.5)) == V(-0.5), "weight decay while maximizing");
  check(regularized(V(2), V(3), true, V(0.0)) == V(-2), "maximize");
  check(regularized(V(2), inf, false, V(0.0)) == V(2), "no weight decay of an infinite parameter");
}

template <class V>
void test_root() {
  Random random{2};
  for (int i = 0; i < 10000; ++i) {
    const V x = V(std::exp(random.uniform(-60, 60)));
    const V got = root(x);
    // Correctly rounded: x lies between the squares of the middles to both neighbours.
    const long double below = (static_cast<long double>(got) + std::nextafter(got, V(0))) / 2;
    const long double above = (static_cast<long double>(got) + std::nextafter(got, 2 * got)) / 2;
    check(below * below <= x && x <= above * above, "root(%a) = %a", double(x), double(got));
  }
  check(root(V(0)) == V(0) && std::isnan(root(V(-1))), "root of 0 and -1");
}

template <class V>
void test_all() {
  test_larger<V>();
  test_lerp<V>();
  test_regularized<V>();
  test_root<V>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_power();
  static_assert(all_operands(3) == 7u && operand_bit(4) == 16u && operand_bit_if(false, 1) == 0u);
  return verdict();
}
