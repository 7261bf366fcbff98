// Whether strided arrays share elements, by their strides, against listing every byte of both.
#include <algorithm>
#include <vector>

#include "check.h"
#include "memory/extent.h"
#include "memory/overlap.h"

using namespace optim_ext::memory;

namespace {

constexpr int64_t kBudget = int64_t{1} << 30;

struct Array {
  int64_t offset, element;  // bytes
  std::vector<int64_t> sizes, strides;

  Extent extent() const {
    return strided_extent(reinterpret_cast<const void*>((uintptr_t{1} << 20) + static_cast<uintptr_t>(offset)), element,
                          sizes, strides);
  }
};

void list_bytes(const Array& array, size_t d, int64_t at, std::vector<int64_t>& out) {
  if (d == array.sizes.size()) {
    for (int64_t b = 0; b < array.element; ++b) out.push_back(at + b);
    return;
  }
  for (int64_t i = 0; i < array.sizes[d]; ++i) list_bytes(array, d + 1, at + i * array.strides[d] * array.element, out);
}

std::vector<int64_t> bytes_of(const Array& array) {
  std::vector<int64_t> bytes;
  list_bytes(array, 0, array.offset, bytes);
  std::sort(bytes.begin(), bytes.end());
  return bytes;
}

bool share(const Array& a, const Array& b) {
  const std::vector<int64_t> first = bytes_of(a), second = bytes_of(b);
  std::vector<int64_t> both;
  std::set_intersection(first.begin(), first.end(), second.begin(), second.end(), std::back_inserter(both));
  return !both.empty();
}

bool repeats(const Array& array) {
  const std::vector<int64_t> bytes = bytes_of(array);
  return std::adjacent_find(bytes.begin(), bytes.end()) != bytes.end();
}

void compare(const Array& a, const Array& b) {
  int64_t budget = kBudget;
  const bool right = share(a, b), found = overlap(a.extent(), b.extent(), budget) == Overlap::some;
  check(found == right && budget >= 0, "offsets %ld %ld, %zu and %zu dimensions: found %d, expected %d",
        static_cast<long>(a.offset), static_cast<long>(b.offset), a.sizes.size(), b.sizes.size(), found, right);
}

// All matrices of up to three rows and columns, with strides of up to four, at all offsets that matter.
void compare_all_small_matrices() {
  std::vector<Array> all;
  for (int64_t rows = 1; rows <= 3; ++rows) {
    for (int64_t columns = 1; columns <= 3; ++columns) {
      for (int64_t s = 0; s <= 4; ++s) {
        for (int64_t t = 0; t <= 4; ++t) all.push_back({0, 1, {rows, columns}, {s, t}});
      }
    }
  }
  for (const Array& a : all) {
    for (Array b : all) {
      if (!chosen()) continue;
      for (b.offset = 0; b.offset <= 20; b.offset += 1 + b.offset % 7) compare(a, b);
    }
  }
}

Array random_array(Random& random, bool nested) {
  Array array;
  array.element = int64_t{1} << random.below(4);
  array.offset = random.below(120);
  if (random.below(2)) array.offset -= array.offset % array.element;
  const int64_t dims = random.below(5);
  int64_t span = 1;
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = 1 + random.below(4);
    const int64_t stride = nested ? span + random.below(3) : random.below(14);
    array.sizes.push_back(size);
    array.strides.push_back(stride);
    span = std::max(span, (size - 1) * stride + span);
  }
  return array;
}

void compare_random_arrays() {
  Random random{5};
  for (int n = 0; n < 20000; ++n) {
    if (!chosen()) continue;
    const Array a = random_array(random, n % 2), b = random_array(random, n % 3 != 0);
    compare(a, b);
    compare(b, a);
    if (std::find(a.strides.begin(), a.strides.end(), 0) != a.strides.end()) continue;
    int64_t budget = kBudget;
    const bool right = repeats(a), found = overlap_within(a.extent(), budget) == Overlap::some;
    check(found == right && budget >= 0, "one array of %zu dimensions: found %d, expected %d", a.sizes.size(), found,
          right);
  }
}

void views_of_one_buffer_take_a_few_trials() {
  const auto columns = [](int64_t first, int64_t count, int64_t rows = 800000) {
    return Array{first * 4, 4, {rows, count}, {14, 1}};
  };
  const struct {
    Array a, b;
    Overlap expected;
  } pairs[] = {
      {columns(0, 3), columns(3, 4), Overlap::none},
      {columns(0, 3), columns(2, 4), Overlap::some},
      {columns(3, 4), columns(0, 3, 799999), Overlap::none},
      {columns(0, 1), {8, 4, {800000 * 14 - 2}, {1}}, Overlap::some},
      {columns(0, 13), {13 * 4, 4, {1}, {1}}, Overlap::none},
      {{0, 4, {1000, 2, 8}, {32, 16, 1}}, {32, 4, {1000, 2, 8}, {32, 16, 1}}, Overlap::none},  // packed rows
      {{0, 4, {1 << 20}, {2}}, {4, 4, {1 << 20}, {2}}, Overlap::none},                         // z.real and z.imag
      {{0, 4, {1 << 20}, {15}}, {4, 4, {1 << 20}, {14}}, Overlap::some},
      {{0, 4, {1 << 20}, {6}}, {4, 4, {1 << 20}, {15}}, Overlap::none},  // 3 divides both strides
  };
  for (const auto& [a, b, expected] : pairs) {
    int64_t budget = 64;
    check(overlap(a.extent(), b.extent(), budget) == expected, "offset %ld", static_cast<long>(b.offset));
  }
}

void what_takes_too_long_is_left_undecided() {
  // A knapsack: large coprime strides, and a distance that lies within every range.
  Array a{0, 1, {}, {}};
  for (int64_t d = 0; d < 24; ++d) {
    a.sizes.push_back(2);
    a.strides.push_back((int64_t{1} << 20) + 2 * (d * d * 7919 % 65521));
  }
  Array b{12 * (int64_t{1} << 20) + 1, 1, {2}, {2}};
  int64_t budget = 1000;
  check(overlap(a.extent(), b.extent(), budget) == Overlap::none && budget == 1000, "odd and even bytes");
  a.strides.back() += 1;
  budget = 1000;
  check(overlap(a.extent(), b.extent(), budget) != Overlap::none && budget < 1000, "a knapsack");
}

void equal_extents_have_equal_members() {
  const Array rows{0, 4, {3, 5}, {5, 1}}, columns{0, 4, {5, 3}, {1, 5}}, flat{0, 4, {15}, {1}};
  check(rows.extent() == flat.extent() && columns.extent() == flat.extent() && flat.extent().is_dense(), "dense");
  const Array ones{8, 4, {1, 5, 1}, {77, 2, 3}}, five{8, 4, {5}, {2}};
  check(ones.extent() == five.extent() && !five.extent().is_dense() && five.extent().dims.size() == 2, "ones");
  const Array none{8, 4, {5, 0}, {2, 1}};
  check(none.extent().begin == none.extent().end && !none.extent().meets(rows.extent()), "no elements");
  check(Array{0, 8, {7}, {0}}.extent() == Array({0, 8, {}, {}}).extent(), "expanded");
}

}  // namespace

int main() {
  compare_all_small_matrices();
  compare_random_arrays();
  views_of_one_buffer_take_a_few_trials();
  what_takes_too_long_is_left_undecided();
  equal_extents_have_equal_members();
  return verdict();
}
