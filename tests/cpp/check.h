// The few words a C++ test needs: check() counts and prints failures, verdict() is what main() returns, chosen() thins
// out cases.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

inline long checks_done = 0, checks_failed = 0;

__attribute__((format(printf, 2, 3))) inline void check(bool good, const char* format, ...) {
  ++checks_done;
  if (good || ++checks_failed > 20) return;
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "failed: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
}

inline int verdict() {
  std::printf("%ld checks, %ld failed\n", checks_done, checks_failed);
  return checks_done == 0 || checks_failed > 0;
}

// Of the cases of a test that has very many, every so manieth, as OPTIM_EXT_EVERY says; all of them where it is not
// set. Emulated processors take dozens of times as long.
inline bool chosen() {
  static const char* const said = std::getenv("OPTIM_EXT_EVERY");
  static const long every = said == nullptr ? 1 : std::atol(said);
  static long cases = 0;
  return every > 0 && cases++ % every == 0;
}

// A small generator whose numbers do not depend on the C++ library (splitmix64, Steele, Lea & Flood 2014).
struct Random {
  uint64_t state;
  uint64_t bits() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform(double low, double high) { return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53; }
  // From 0 up to the limit.
  int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(limit)); }
  bool one_in(int64_t many) { return below(many) == 0; }
};
