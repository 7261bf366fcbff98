// Storage conversion: widening of every 16-bit pattern, and narrowing against a slow search in a table of all values.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "check.h"
#include "kernels/convert.h"

using namespace optim_ext;

namespace {

struct Format {
  const char* name;
  int exponent_bits, mantissa_bits;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
  bool is_nan(uint16_t h) const { return (h & 0x7fff) > infinity(); }
  uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits); }

  // What a pattern without its sign stands for, by the definition of the format. Infinity stands for the first power of
  // two that does not fit, which is where rounding to nearest starts to overflow from.
  double magnitude(int pattern) const {
    const int bias = (1 << (exponent_bits - 1)) - 1, exponent = pattern >> mantissa_bits;
    const double fraction = std::ldexp(pattern & ((1 << mantissa_bits) - 1), -mantissa_bits);
    return exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
  }
};

const Format kFormats[] = {
    {"bf16", 8, 7, [](uint16_t h) { return widen_bf16(h); }, [](float x) { return narrow_bf16(x); }},
    {"f16", 5, 10, [](uint16_t h) { return widen_f16(h); }, [](float x) { return narrow_f16(x); }},
};

void test_widen(const Format& format) {
  for (int pattern = 0; pattern < 0x10000; ++pattern) {
    const uint16_t h = static_cast<uint16_t>(pattern);
    const float wide = format.widen(h);
    if (format.is_nan(h)) {
      check(std::isnan(wide) && format.is_nan(format.narrow(wide)), "%s NaN %04x", format.name, h);
      continue;
    }
    const bool is_infinite = (h & 0x7fff) == format.infinity();
    const double magnitude = is_infinite ? std::numeric_limits<double>::infinity() : format.magnitude(h & 0x7fff);
    const float expected = static_cast<float>(h & 0x8000 ? -magnitude : magnitude);
    check(float_to_bits(wide) == float_to_bits(expected), "%s widen %04x: %a, not %a", format.name, h, wide, expected);
    check(format.narrow(wide) == h, "%s round trip %04x: %04x", format.name, h, format.narrow(wide));
  }
}

// The nearest pattern to x, the even one of two that are as near.
uint16_t narrow_slowly(const std::vector<double>& table, float x) {
  const double magnitude = std::fabs(static_cast<double>(x));
  const auto above = std::lower_bound(table.begin(), table.end(), magnitude);
  size_t nearest = table.size() - 1;
  if (above == table.begin()) {
    nearest = 0;
  } else if (above != table.end()) {
    const size_t high = above - table.begin(), low = high - 1;
    const double to_low = magnitude - table[low], to_high = table[high] - magnitude;
    nearest = to_low < to_high ? low : to_high < to_low ? high : high % 2 == 0 ? high : low;
  }
  return static_cast<uint16_t>(nearest | (std::signbit(x) ? 0x8000 : 0));
}

void test_narrow(const Format& format) {
  std::vector<double> table;
  for (int pattern = 0; pattern <= format.infinity(); ++pattern) table.push_back(format.magnitude(pattern));
  const auto compare = [&](float x) {
    for (const float signed_x : {x, -x}) {
      const uint16_t got = format.narrow(signed_x), expected = narrow_slowly(table, signed_x);
      check(got == expected, "%s narrow %a: %04x, not %04x", format.name, signed_x, got, expected);
    }
  };
  // Each value of the format, each tie between two of them, and their neighbours among the floats.
  for (size_t i = 0; i + 1 < table.size(); ++i) {
    if (!chosen()) continue;
    for (const double middle : {table[i], 0.5 * (table[i] + table[i + 1])}) {
      float x = static_cast<float>(middle);
      for (int step = 0; step < 2; ++step) x = std::nextafter(x, -1.0f);
      for (int step = 0; step < 5; ++step, x = std::nextafter(x, INFINITY)) {
        if (x >= 0.0f) compare(x);
      }
    }
  }
  // Floats of every size, subnormal ones among them.
  for (uint64_t bits = 0; bits < 0x7f800000u; bits += 4093) {
    if (chosen()) compare(bits_to_float(static_cast<uint32_t>(bits)));
  }
  compare(std::numeric_limits<float>::denorm_min());
  compare(std::numeric_limits<float>::max());
  compare(INFINITY);
  for (uint32_t payload = 1; payload < 0x800000u; payload += 4093) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const uint16_t got = format.narrow(bits_to_float(sign | 0x7f800000u | payload));
      check(format.is_nan(got), "%s narrow NaN with payload %06x: %04x", format.name, payload, got);
    }
  }
}

template <class V>
void test_elements() {
  // load_element and store_element reach the element they name, in the storage they are told.
  for (const Storage storage : {Storage::f32, Storage::f64, Storage::bf16, Storage::f16}) {
    alignas(8) unsigned char memory[8 * 8];
    std::fill(std::begin(memory), std::end(memory), 0xa5);
    const int64_t size = bytes_of(storage);
    store_element<V>(memory, storage, 3, V(-1.5));
    check(load_element<V>(memory, storage, 3) == V(-1.5), "element of storage %d", static_cast<int>(storage));
    for (int64_t i = 0; i < 64; ++i) {
      check(i / size == 3 || memory[i] == 0xa5, "storage %d wrote byte %ld", static_cast<int>(storage),
            static_cast<long>(i));
    }
  }
}

}  // namespace

int main() {
  for (const Format& format : kFormats) {
    test_widen(format);
    test_narrow(format);
  }
  test_elements<float>();
  test_elements<double>();
  return verdict();
}
