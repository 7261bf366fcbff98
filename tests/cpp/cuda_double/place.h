// Where the tests' calls run: on the double, in plain memory that is exactly as long as asked for.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../cases.h"
#include "core.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cuda/driver.h"

namespace optim_ext::device {

// Whether races are looked for, as they are at first. It takes ten times as long, so of many cases that differ in their
// numbers alone some will do.
void find_races(bool on);

}  // namespace optim_ext::device

namespace optim_ext {

// Which of the planted faults is in the kernels; 0: none. (faults.cmake)
extern int planted_fault;

// Whether to look for races in every case.
extern bool all_races;
inline void find_races(bool on) { device::find_races(on || all_races); }

struct DoublePlace {
  class Table {
   public:
    Table(const DoublePlace& place, int64_t bytes)
        : place_(place), bytes_(bytes), host_(new unsigned char[bytes]), device_(new unsigned char[bytes]) {}
    unsigned char* host() { return host_.get(); }
    const unsigned char* send() {
      const device::Status status = device::upload(device_.get(), host_.get(), bytes_, place_.stream);
      ::check(status == device::kSuccess, "an upload fails");
      ++uploads;
      std::memset(host_.get(), 0xff, bytes_);  // nobody may read it any more
      return device_.get();
    }

   private:
    const DoublePlace& place_;
    int64_t bytes_;
    std::unique_ptr<unsigned char[]> host_, device_;
  };

  // Full of NaN, so that a number nobody wrote is seen.
  class Scratch {
   public:
    explicit Scratch(int64_t bytes) : memory_(new unsigned char[bytes]) { std::memset(memory_.get(), 0xff, bytes); }
    void* data() const { return memory_.get(); }

   private:
    std::unique_ptr<unsigned char[]> memory_;
  };

  static void check(device::Status status) {
    ++launches;
    ::check(status == device::kSuccess, "a launch fails");
  }
  static void require(bool condition, const char* message) { ::check(condition, "%s", message); }

  static inline long launches = 0, uploads = 0;
  device::Stream stream = nullptr;
  bool capturing = false;
  int multiprocessors = 4;
};

// What the driver is given.
struct DoubleCall {
  std::vector<Bundle> bundles;
  std::vector<cuda::LiveHyper> device_hypers;
  Pass pass;
  bool steps_on_device = false, draws_on_device = false;
};

constexpr cpu::Isa kIsa = cpu::Isa::baseline;

inline bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

// The groups of cases.
void test_sweeps();
void test_kept();
void test_reductions();
void test_fibers();
void test_history();
void test_order();
void test_misuse(const char* which);

}  // namespace optim_ext
