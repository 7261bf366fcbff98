// In which order members that share memory are worked on: against listing the bytes of every pair.
#include <algorithm>
#include <memory>
#include <vector>

#include "check.h"
#include "memory/overlap.h"
#include "memory/turns.h"

using namespace optim_ext::memory;

namespace {

constexpr uintptr_t kBase = uintptr_t{1} << 20;

// A view of rows and columns of a matrix of floats that is `width` wide.
Extent view(int64_t width, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {width, 1};
  return strided_extent(reinterpret_cast<const void*>(kBase + static_cast<uintptr_t>(4 * (row * width + column))), 4,
                        sizes, strides);
}

bool share(const Extent& a, const Extent& b) {
  int64_t budget = int64_t{1} << 40;
  return overlap(a, b, budget) == Overlap::some;
}

Extent random_view(Random& random) {
  const int64_t width = random.below(4) ? 14 : 7, column = random.below(width), row = random.below(6);
  return view(width, row, 1 + random.below(6), column, 1 + random.below(std::min<int64_t>(4, width - column)));
}

void random_views() {
  Random random{3};
  for (int n = 0; n < 3000; ++n) {
    const int32_t members = 2 + static_cast<int32_t>(random.below(8));
    std::vector<Access> writes, reads;
    for (int32_t i = 0; i < members; ++i) {
      writes.push_back({random_view(random), i, 0});
      if (random.below(3) == 0) writes.push_back({random_view(random), i, 1});
      if (random.below(3) == 0) reads.push_back({random_view(random), i, 2});
    }
    const Turns turns = turns_of(writes, reads, members);
    bool bad_write = false, bad_read = false, late_read = false, any = false;
    std::vector<int32_t> right(members, 0);
    for (const Access& a : writes) {
      for (const Access& b : writes) bad_write |= &a < &b && a.member == b.member && share(a.extent, b.extent);
      for (const Access& b : reads) {
        bad_read |= a.member == b.member && share(a.extent, b.extent);
        late_read |= a.member < b.member && share(a.extent, b.extent);
      }
    }
    for (int32_t after = 0; after < members; ++after) {  // the earliest turn behind all members it overlaps
      const auto follow = [&](const Access& a, const Access& b) {
        const bool follows = a.member < after && b.member == after && share(a.extent, b.extent);
        if (follows) right[after] = std::max(right[after], right[a.member] + 1);
        any |= follows;
      };
      for (const Access& a : writes) {
        for (const Access& b : writes) follow(a, b);
        for (const Access& b : reads) {
          follow(a, b);
          follow(b, a);
        }
      }
    }
    if (!any) right.clear();
    check((turns.bad_write >= 0) == bad_write, "a member's own writes, %d", n);
    check((turns.bad_read >= 0) == bad_read, "a member's own reads, %d", n);
    check((turns.late_read >= 0) == late_read, "reads of what is written before, %d", n);
    check(turns.of_member == right, "turns, %d", n);
  }
}

void views_of_one_matrix_have_one_turn() {
  std::vector<Access> writes;  // of 2000 columns; comparing all pairs would take seconds
  for (int32_t i = 0; i < 2000; ++i) writes.push_back({view(2000, 0, 100000, i, 1), i, 0});
  check(turns_of(writes, {}, 2000).of_member.empty(), "columns");
  writes.push_back({view(2000, 7, 1, 5, 3), 2000, 0});
  const std::vector<int32_t> turns = turns_of(writes, {}, 2001).of_member;
  check(turns.size() == 2001 && turns.back() == 1 && turns[0] == 0, "columns and a piece of a row");
}

void a_buffer_and_its_views_have_two_turns() {
  std::vector<Access> writes{{dense_extent(reinterpret_cast<const void*>(kBase), 4000), 0, 0}};
  for (int32_t i = 0; i < 10; ++i) {
    writes.push_back(
        {dense_extent(reinterpret_cast<const void*>(kBase + 400 * static_cast<uintptr_t>(i)), 400), i + 1, 0});
  }
  std::vector<int32_t> right(11, 1);
  right[0] = 0;
  check(turns_of(writes, {}, 11).of_member == right, "buffer first");
}

void what_is_read_in_place_is_sound() {
  const std::vector<Access> writes{{view(14, 0, 9, 2, 3), 0, 0}}, reads{{view(14, 0, 9, 2, 3), 0, 1, true}};
  const Turns turns = turns_of(writes, reads, 1);
  check(turns.bad_read < 0 && turns.of_member.empty(), "in place");
  check(turns_of(writes, {{view(14, 0, 9, 2, 3), 0, 1}}, 1).bad_read == 0, "in another order");
  // What overlaps an earlier member does so as a write, too.
  const std::vector<Access> both{{view(14, 0, 9, 2, 3), 0, 0}, {view(14, 0, 9, 4, 3), 1, 0}};
  const Turns later = turns_of(both, {{view(14, 0, 9, 4, 3), 1, 1, true}}, 2);
  check(later.late_read < 0 && later.of_member == std::vector<int32_t>({0, 1}), "in place, overlapping");
}

void too_many_pairs_to_list() {
  std::vector<Access> writes;
  for (int32_t i = 0; i < 1600; ++i) writes.push_back({view(14, 0, 3, 0, 14), i, 0});
  const std::vector<int32_t> turns = turns_of(writes, {}, 1600).of_member;
  check(turns.size() == 1600 && std::is_sorted(turns.begin(), turns.end()) && turns.back() == 1599, "one by one");
}

}  // namespace

int main() {
  random_views();
  views_of_one_matrix_have_one_turn();
  a_buffer_and_its_views_have_two_turns();
  what_is_read_in_place_is_sound();
  too_many_pairs_to_list();
  return verdict();
}
