// The common walk over strided arrays: every element of each array once, whatever is merged, reordered or listed.
#include <algorithm>
#include <vector>

#include "check.h"
#include "kernels/operand.h"
#include "memory/strided.h"

using namespace optim_ext;

namespace {

// Where the elements of all arrays lie, element by element in the order of the walk.
std::vector<std::vector<int64_t>> places(const memory::Walk& walk, const std::vector<int64_t>& outer) {
  Layout layout{};
  layout.ndim = static_cast<int32_t>(walk.dims.size());
  layout.outer = outer.empty() ? nullptr : outer.data();
  int64_t numel = 1;
  for (size_t d = 0; d < walk.dims.size(); ++d) {
    layout.sizes[d] = walk.dims[d].size;
    numel *= walk.dims[d].size;
    for (int k = 0; k < kMaxOperands; ++k) layout.strides[k][d] = walk.dims[d].strides[k];
  }
  std::vector<std::vector<int64_t>> found;
  for (int64_t i = 0; i < numel; ++i) {
    std::vector<int64_t>& element = found.emplace_back();
    for (int k = 0; k < kMaxOperands; ++k) {
      if ((walk.used >> k) & 1u) element.push_back(layout.offset(k, i));
    }
  }
  return found;
}

// Up to `most` dimensions of two, three or one element, in an order of its own for each of three arrays; the second may
// repeat elements.
memory::Walk random_walk(Random& random, int most) {
  memory::Walk walk{{}, 0b1011};
  const int dims = static_cast<int>(random.bits() % static_cast<uint64_t>(most + 1));
  for (int d = 0; d < dims; ++d) walk.dims.push_back({1 + static_cast<int64_t>(random.bits() % (d < 9 ? 3 : 2)), {}});
  for (const int k : {0, 1, 3}) {
    std::vector<size_t> order;
    for (int d = 0; d < dims; ++d)
      order.insert(order.begin() + static_cast<int>(random.bits() % (order.size() + 1)), d);
    int64_t stride = 1 + static_cast<int64_t>(random.bits() % 2);
    for (const size_t d : order) {
      walk.dims[d].strides[k] = k == 1 && random.bits() % 5 == 0 ? 0 : stride;
      stride *= walk.dims[d].size + (k == 3 && random.bits() % 4 == 0);
    }
  }
  return walk;
}

void walks_visit_the_same_elements() {
  Random random{9};
  for (int n = 0; n < 4000; ++n) {
    if (!chosen()) continue;
    memory::Walk walk = random_walk(random, n % 100 == 0 ? 12 : 6);
    auto right = places(walk, {});
    memory::order(walk, 0);
    memory::merge(walk);
    if (n % 2) memory::lengthen_runs(walk);
    if (n % 5 < 2) memory::make_squares(walk);
    const size_t most = n % 3 == 0 ? 2 : kMaxDims;
    const std::vector<int64_t> outer = memory::list_outer(walk, most);
    check(walk.dims.size() <= most, "%d: %zu dimensions", n, walk.dims.size());
    auto found = places(walk, outer);
    std::sort(right.begin(), right.end());
    std::sort(found.begin(), found.end());
    check(found == right, "%d", n);
  }
}

void the_leader_is_read_front_to_back() {
  memory::Walk walk{{{4, {1, 6}}, {2, {12, 3}}, {3, {4, 1}}}, 0b11};
  memory::order(walk, 0);
  memory::merge(walk);
  const auto found = places(walk, {});
  for (size_t i = 0; i < found.size(); ++i) check(found[i][0] == static_cast<int64_t>(i), "element %zu", i);
  memory::Walk flat{{{4, {12, 24}}, {3, {4, 8}}, {4, {1, 2}}}, 0b11};
  memory::merge(flat);
  check(flat.dims.size() == 1 && flat.dims[0].size == 48, "one dimension");
}

// The matrices that are walked in squares, and what is walked as it is.
void squares_have_both_orders() {
  struct {
    int64_t rows, columns;
    size_t dims;
    int64_t fastest;
  } const matrices[] = {{768, 768, 4, 16},  {96, 9, 2, 9},    {769, 768, 3, 16},
                        {768, 769, 3, 769}, {4, 768, 2, 768}, {768, 64, 2, 64}};
  for (const auto& [rows, columns, dims, fastest] : matrices) {
    if (!chosen()) continue;
    memory::Walk walk{{{rows, {columns, 1}}, {columns, {1, rows}}}, 0b11};
    auto right = places(walk, {});
    memory::make_squares(walk);
    check(walk.dims.size() == dims && walk.dims.back().size == fastest, "%ld x %ld: %zu dimensions, runs of %ld",
          static_cast<long>(rows), static_cast<long>(columns), walk.dims.size(),
          static_cast<long>(walk.dims.back().size));
    auto found = places(walk, {});
    std::sort(right.begin(), right.end());
    std::sort(found.begin(), found.end());
    check(found == right, "%ld x %ld", static_cast<long>(rows), static_cast<long>(columns));
  }
}

}  // namespace

int main() {
  walks_visit_the_same_elements();
  squares_have_both_orders();
  the_leader_is_read_front_to_back();
  return verdict();
}
