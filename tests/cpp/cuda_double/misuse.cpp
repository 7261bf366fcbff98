// Kernels that are wrong on purpose, each in one way the double has to name; and what its order of threads depends on.
#include <algorithm>
#include <cstring>

#include "device/kernel.h"
#include "place.h"

namespace optim_ext {

namespace {

OPTIM_EXT_KERNEL(64) nothing(int) {}

OPTIM_EXT_KERNEL(64) skipping_a_barrier(int) {
  if (device::thread_x() != 3) device::barrier();
}

OPTIM_EXT_KERNEL(64) leaving_before_a_barrier(int) {
  if (device::thread_x() == 0) return;
  device::before_atomic();  // lets the first thread leave
  device::barrier();
}

OPTIM_EXT_KERNEL(64) different_barriers(int) {
  if (device::thread_x() < 32) {
    device::barrier();
  } else {
    device::barrier();
  }
}

OPTIM_EXT_KERNEL(64) waiting_for_each_other(int) {
  if (device::thread_x() < 16) {
    device::barrier();
  } else {
    device::shuffle_down(~0u, 1.0, 1);
  }
}

OPTIM_EXT_KERNEL(64) absent_lanes(int) {
  if (device::thread_x() >= 16) return;
  device::before_atomic();
  device::shuffle_down(~0u, 1.0, 1);
}

OPTIM_EXT_KERNEL(64) lanes_that_do_not_exist(int) { device::shuffle_down(~0u, 1.0, 1); }

OPTIM_EXT_KERNEL(64) not_in_its_mask(int) { device::shuffle_down(0xffffu, 1.0, 1, 16); }

OPTIM_EXT_KERNEL(64) different_masks(int) {
  device::shuffle_down(device::thread_x() % 32 < 16 ? ~0u : 0xffff0000u, 1.0, 1, 16);
}

OPTIM_EXT_KERNEL(64) asking_a_stranger(int) {
  if (device::thread_x() < 8) device::shuffle_down(0xffu, 1.0, 1);
}

OPTIM_EXT_KERNEL(64) launching(int) { device::launch(&nothing, {1}, 32, nullptr, 1); }

struct Large {
  unsigned char bytes[device::kMaxArgumentBytes + 1];
};
OPTIM_EXT_KERNEL(64) large_argument(OPTIM_EXT_ARGUMENT(Large)) {}

OPTIM_EXT_KERNEL(64) racing(int* shared_by_all) { *shared_by_all += 1; }

OPTIM_EXT_KERNEL(64) unfenced(int* data, unsigned* finished) {
  data[device::block_x()] = 1;
  if (device::atomic_add(finished, 1u) == 3) {
    for (int i = 0; i < 4; ++i) data[4] += data[i];
  }
}

OPTIM_EXT_KERNEL(64) reading_what_nobody_wrote(int* to) {
  OPTIM_EXT_SHARED(memory, int);
  *to = memory;
}

// The order in which threads of blocks run.
OPTIM_EXT_KERNEL(64) sign_the_list(unsigned* length, unsigned* list) {
  list[device::atomic_add(length, 1u)] = device::block_x() * 64 + device::thread_x();
}

std::vector<unsigned> order_of(uint64_t seed) {
  device::set_seed(seed);
  unsigned length = 0;
  std::vector<unsigned> list(6 * 64);
  device::launch(&sign_the_list, {6}, 64, nullptr, &length, list.data());
  check(length == list.size(), "%u threads ran", length);
  return list;
}

}  // namespace

void test_order() {
  std::vector<std::vector<unsigned>> orders;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    orders.push_back(order_of(seed));
    check(orders.back() == order_of(seed), "seed %d gives two orders", static_cast<int>(seed));
    std::vector<bool> ran(6 * 64);
    for (const unsigned thread : orders.back()) ran[thread] = true;
    for (const bool one : ran) check(one, "a thread did not run");
  }
  std::sort(orders.begin(), orders.end());
  const auto distinct = std::unique(orders.begin(), orders.end()) - orders.begin();
  check(distinct > 12, "20 seeds give %d orders", static_cast<int>(distinct));
  int found = 0;
  device::launch(&reading_what_nobody_wrote, {1}, 1, nullptr, &found);
  check(static_cast<unsigned>(found) == 0xcbcbcbcbu, "shared memory starts as %x", static_cast<unsigned>(found));
}

void test_misuse(const char* which) {
  const auto is = [&](const char* name) { return std::strcmp(which, name) == 0; };
  const auto run = [](auto* kernel, device::Grid grid, int threads, auto... arguments) {
    device::launch(kernel, grid, threads, nullptr, arguments...);
  };
  static int numbers[5] = {};
  static unsigned finished = 0;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    device::set_seed(seed);
    if (is("skipping_a_barrier")) run(&skipping_a_barrier, {2}, 64, 0);
    if (is("leaving_before_a_barrier")) run(&leaving_before_a_barrier, {2}, 64, 0);
    if (is("different_barriers")) run(&different_barriers, {2}, 64, 0);
    if (is("waiting_for_each_other")) run(&waiting_for_each_other, {2}, 32, 0);
    if (is("absent_lanes")) run(&absent_lanes, {2}, 64, 0);
    if (is("lanes_that_do_not_exist")) run(&lanes_that_do_not_exist, {1}, 40, 0);
    if (is("not_in_its_mask")) run(&not_in_its_mask, {1}, 32, 0);
    if (is("different_masks")) run(&different_masks, {1}, 32, 0);
    if (is("asking_a_stranger")) run(&asking_a_stranger, {1}, 32, 0);
    if (is("launching")) run(&launching, {1}, 32, 0);
    if (is("no_blocks")) run(&nothing, {0}, 32, 0);
    if (is("many_rows_of_blocks")) run(&nothing, {1, 65536}, 32, 0);
    if (is("many_threads")) run(&nothing, {1}, 2048, 0);
    if (is("large_argument")) run(&large_argument, {1}, 32, Large{});
    if (is("racing")) run(&racing, {2}, 64, numbers);
    if (is("unfenced")) run(&unfenced, {4}, 1, numbers, &finished), finished = 0;
  }
  std::fprintf(stderr, "the double let '%s' pass\n", which);
}

}  // namespace optim_ext
