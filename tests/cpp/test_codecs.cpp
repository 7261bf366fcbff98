// How numbers are kept that their own storage has no room for: every codec against what it is to hold.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "storage/block8.h"
#include "storage/kahan.h"
#include "storage/master.h"
#include "storage/remainder.h"
#include "storage/stochastic.h"

using namespace optim_ext;

namespace {

// Calls visit(bits) for floats of every sign, exponent and upper fraction, with the lower halves where rounding turns.
template <class Visit>
void over_floats(const Visit& visit) {
  Random random{7};
  for (uint32_t upper = 0; upper < 0x10000u; ++upper) {
    for (const uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) visit(upper << 16 | lower);
    for (int i = 0; i < 4; ++i) visit(upper << 16 | static_cast<uint32_t>(random.bits() & 0xffffu));
  }
}

bool is_nan_bits(uint32_t bits) { return (bits & kMagnitude) > kInfinity; }

void a_split_master_comes_back_bit_for_bit() {
  over_floats([](uint32_t bits) {
    const SplitMaster split = split_master(bits_to_float(bits));
    const uint32_t back = float_to_bits(join_master(split.param, split.remainder));
    if (is_nan_bits(bits)) {
      check(back == ((bits & 0x80000000u) | 0x7fc00000u), "NaN %08x came back as %08x", bits, back);
      check((split.param & 0x7fffu) > 0x7f80u, "NaN %08x has the parameter %04x", bits, split.param);
      return;
    }
    check(back == bits, "master %08x came back as %08x", bits, back);
    // The parameter is the nearest one, which a tie may make one more than nearest even.
    const uint16_t even = narrow_bf16(bits_to_float(bits));
    const bool is_tie = (bits & 0xffffu) == 0x8000u;
    check(split.param == even || (is_tie && split.param == even + 1), "master %08x has the parameter %04x, not %04x",
          bits, split.param, even);
  });
}

void a_master_holds_until_somebody_writes_its_parameter() {
  over_floats([](uint32_t bits) {
    const float master = bits_to_float(bits);
    const auto is_kept = [&](float healed) {
      return float_to_bits(healed) == bits || (is_nan_bits(bits) && std::isnan(healed));
    };
    check(is_kept(healed_bf16(master, narrow_bf16(master))), "bf16 master %08x was healed", bits);
    check(is_kept(healed_f16(master, narrow_f16(master))), "f16 master %08x was healed", bits);
    check(healed_bf16(master, 0x4040u) == 3.0f || narrow_bf16(master) == 0x4040u, "stale bf16 master %08x stayed",
          bits);
    check(healed_f16(master, 0x4200u) == 3.0f || narrow_f16(master) == 0x4200u, "stale f16 master %08x stayed", bits);
  });
}

void a_compensated_pair_loses_less_than_its_parameter_alone() {
  over_floats([](uint32_t bits) {
    const float value = bits_to_float(bits);
    const CompensatedValue pair = compensate_bf16(value), half = compensate_f16(value);
    const float back = join_compensated_bf16(pair.param, pair.compensation);
    const float half_back = join_compensated_f16(half.param, half.compensation);
    check(pair.param == narrow_bf16(value) && half.param == narrow_f16(value), "%a is not rounded to nearest", value);
    if (!std::isfinite(widen_bf16(pair.param))) {
      check(float_to_bits(back) == float_to_bits(widen_bf16(pair.param)), "%a came back as %a", value, back);
    } else {
      // 8 bits of the parameter, and as many of what it has lost.
      check(std::fabs(back - value) <= std::max(std::fabs(value) * 0x1p-16f, 0x1p-133f), "%a came back as %a", value,
            back);
    }
    if (!std::isfinite(widen_f16(half.param))) {
      check(float_to_bits(half_back) == float_to_bits(widen_f16(half.param)), "%a came back as %a", value, half_back);
    } else {
      check(std::fabs(half_back - value) <= std::max(std::fabs(value) * 0x1p-21f, 0x1p-25f), "%a came back as %a",
            value, half_back);
    }
  });
}

void chance_rounds_to_a_neighbour_and_hides_nothing() {
  Random random{11};
  over_floats([&](uint32_t bits) {
    const float value = bits_to_float(bits);
    for (const uint32_t word : {0u, 1u, 0x8000u, 0xffffu, static_cast<uint32_t>(random.bits() & 0xffffu)}) {
      const uint16_t got = narrow_bf16_by_chance(value, word);
      if (std::isnan(value)) {
        check(std::isnan(widen_bf16(got)), "NaN %08x became %04x", bits, got);
      } else if (std::isinf(value)) {
        check(widen_bf16(got) == value, "%a became %04x", value, got);
      } else {
        const uint32_t down = bits >> 16;
        check(got == down || ((bits & 0xffffu) != 0 && got == down + 1), "%a became %04x", value, got);
        check(std::isfinite(widen_bf16(got)), "%a became infinite", value);
      }
    }
  });
}

// The expectation of a rounded value is the value: over all words of 16 bits exactly so.
void chance_is_in_proportion_to_the_distance() {
  for (const uint32_t bits : {0x3f800000u, 0x3f801000u, 0x3f808000u, 0xbf80ffffu, 0x00000001u, 0x7f7e1234u}) {
    int64_t up = 0;
    for (uint32_t word = 0; word < 0x10000u; ++word)
      up += narrow_bf16_by_chance(bits_to_float(bits), word) != bits >> 16;
    check(up == static_cast<int64_t>(bits & 0xffffu), "%08x went up %ld times of 65536", bits, static_cast<long>(up));
  }
}

// Sums over many words have the distribution of independent uniform numbers: their distance from the mean, in standard
// deviations, for elements next to each other, parameters next to each other, and steps next to each other.
void words_are_as_good_as_random() {
  constexpr int kCount = 1 << 16;
  const auto check_stream = [&](const char* what, const auto& word) {
    for (const int serves : {0, 1, 2}) {
      double sum = 0.0, squares = 0.0, lagged[3] = {};
      std::vector<double> values(kCount);
      for (int i = 0; i < kCount; ++i) {
        const uint32_t drawn = word(i);
        values[i] =
            ((serves == 0 ? word_of_param(drawn) : word_of_state(drawn, serves == 1, 16)) + 0.5) / 65536.0 - 0.5;
        sum += values[i];
        squares += values[i] * values[i] - 1.0 / 12.0;
      }
      const int lags[] = {1, 64, 256};
      for (int l = 0; l < 3; ++l) {
        for (int i = lags[l]; i < kCount; ++i) lagged[l] += values[i] * values[i - lags[l]];
      }
      const double root = std::sqrt(static_cast<double>(kCount));
      check(std::fabs(sum / root / std::sqrt(1.0 / 12.0)) < 4.0, "%s: mean", what);
      check(std::fabs(squares / root / std::sqrt(1.0 / 180.0)) < 4.0, "%s: variance", what);
      for (int l = 0; l < 3; ++l) check(std::fabs(lagged[l] / root * 12.0) < 4.0, "%s: lag %d", what, lags[l]);
    }
  };
  const uint64_t param = rounding_key(0, 3);
  check_stream("elements", RandomWords(key_at_step(param, 1), 0));
  check_stream("far elements", RandomWords(key_at_step(param, 1), int64_t{5} << 32));
  check_stream("steps", [&](int i) { return RandomWords(key_at_step(param, i), 0)(17); });
  check_stream("parameters", [&](int i) { return RandomWords(key_at_step(rounding_key(0, i), 9), 0)(17); });
  check_stream("seeds", [&](int i) { return RandomWords(key_at_step(rounding_key(i, 0), 9), 0)(17); });
}

struct Block {
  std::vector<float> values;
  uint8_t exponent() const {
    uint32_t largest = 0;
    for (const float value : values) largest = std::max(largest, float_to_bits(value) & kMagnitude);
    return exponent_of_block(largest);
  }
};

// Values of a block are off by a share of themselves as long as they lie within the span of a code.
void eight_bits_keep_small_elements_of_a_block() {
  Random random{13};
  for (const double scale : {1e-24, 1e-6, 1.0, 1e20}) {
    for (const double spread : {1.0, 10.0, 1e3, 1e4}) {
      Block block;
      for (int64_t i = 0; i < kBlock8; ++i)
        block.values.push_back(static_cast<float>(scale * std::pow(spread, -random.uniform(0.0, 1.0))));
      const uint8_t exponent = block.exponent();
      for (const float value : block.values) {
        for (const float signed_value : {value, -value}) {
          const float back = decode_signed8(encode_signed8(signed_value, exponent, kToNearest), exponent);
          check(std::fabs(back - signed_value) <= std::fabs(value) * 0.0626f, "%a came back as %a", signed_value, back);
        }
        double mean = 0.0;
        constexpr int kDraws = 4096;
        for (int draw = 0; draw < kDraws; ++draw) {
          const float back = decode_positive8(
              encode_positive8(value, exponent, static_cast<uint32_t>(random.bits() & 0xfffffu)), exponent);
          check(std::fabs(back - value) <= value * 0.1251f, "%a came back as %a", value, back);
          mean += back / static_cast<double>(kDraws);
        }
        check(std::fabs(mean - value) <= value * 0.005, "%a is %a on average", value, mean);
      }
    }
  }
}

void no_positive_value_becomes_zero_and_no_block_is_cut_off() {
  const float sizes[] = {std::numeric_limits<float>::denorm_min(), 1e-38f, 1e-20f, 1.0f, 1.9f, 1.99999f, 3e38f,
                         std::numeric_limits<float>::max()};
  for (const float largest : sizes) {
    const uint8_t exponent = Block{{largest}}.exponent();
    check(exponent != kNotFinite, "%a counts as not finite", largest);
    for (const float value : sizes) {
      if (value > largest) continue;
      for (const uint32_t word : {0u, 0xfffffu}) {
        const float back = decode_positive8(encode_positive8(value, exponent, word), exponent);
        check(back > 0.0f && std::isfinite(back), "%a in a block up to %a came back as %a", value, largest, back);
      }
    }
    if (largest < 1e-28f || largest > 3.2e38f) continue;
    const float back = decode_signed8(encode_signed8(largest, exponent, kToNearest), exponent);
    check(std::fabs(back - largest) <= largest * 0.0626f, "the largest, %a, came back as %a", largest, back);
  }
  const uint8_t exponent = Block{{0.0f}}.exponent();
  check(decode_positive8(encode_positive8(0.0f, exponent, 0xfffffu), exponent) == 0.0f, "zero is not zero");
  check(decode_signed8(encode_signed8(0.0f, exponent, 0xfffffu), exponent) == 0.0f, "zero is not zero");
}

void a_block_that_is_not_finite_shows_it() {
  for (const float bad : {INFINITY, -INFINITY, std::numeric_limits<float>::quiet_NaN()}) {
    const uint8_t exponent = Block{{1.0f, bad}}.exponent();
    check(exponent == kNotFinite, "%f gives the exponent %d", bad, exponent);
    for (int code = 0; code < 256; ++code) {
      check(std::isnan(decode_signed8(static_cast<uint8_t>(code), exponent)), "code %d hides %f", code, bad);
      check(std::isnan(decode_positive8(static_cast<uint8_t>(code), exponent)), "code %d hides %f", code, bad);
    }
  }
}

// Every code of every exponent is its own number's code again: a state that is only read and written stays as it is.
void codes_stay_as_they_are() {
  for (int exponent = kLeastExponent; exponent < kNotFinite; ++exponent) {
    const auto e = static_cast<uint8_t>(exponent);
    for (int c = 0; c < 256; ++c) {
      const auto code = static_cast<uint8_t>(c);
      for (const uint32_t word : {0u, 0xfffffu}) {
        const uint8_t again = encode_signed8(decode_signed8(code, e), e, word);
        check(again == code, "signed code %02x of %d became %02x", code, exponent, again);
        const uint8_t positive = encode_positive8(decode_positive8(code, e), e, word);
        check(positive == code, "positive code %02x of %d became %02x", code, exponent, positive);
      }
    }
  }
}

// An average of squares that grows by less than half a code at a time gets to where it belongs.
void an_average_in_eight_bits_does_not_stall() {
  const RandomWords words(key_at_step(rounding_key(0, 1), 1), 0);
  double sum = 0.0;
  for (int element = 0; element < kBlock8; ++element) {
    float average = 0.0f;
    for (uint32_t step = 0; step < 3000; ++step) {
      average = 0.999f * average + 0.001f;
      const uint8_t exponent = Block{{average}}.exponent();
      const uint32_t word = words(step * 64 + element) >> 12;
      average = decode_positive8(encode_positive8(average, exponent, word), exponent);
    }
    sum += average / static_cast<double>(kBlock8);
  }
  check(std::fabs(sum - 0.950) < 0.02, "the average is %f, not 0.950", sum);
}

}  // namespace

int main() {
  a_split_master_comes_back_bit_for_bit();
  a_master_holds_until_somebody_writes_its_parameter();
  a_compensated_pair_loses_less_than_its_parameter_alone();
  chance_rounds_to_a_neighbour_and_hides_nothing();
  chance_is_in_proportion_to_the_distance();
  words_are_as_good_as_random();
  eight_bits_keep_small_elements_of_a_block();
  no_positive_value_becomes_zero_and_no_block_is_cut_off();
  a_block_that_is_not_finite_shows_it();
  codes_stay_as_they_are();
  an_average_in_eight_bits_does_not_stall();
  return verdict();
}
