// Parameters and state that are kept in another way than a rule sees them: opened in float, swept by any rule and
// closed, tile by tile. Compiled once per instruction set inside the namespace OPTIM_EXT_ISA (for_each_isa.h).

#include "convert-inl.h"
#include "tiles-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// A parameter of 16 bits and its twin, n elements of each, as the numbers they are together: in `buffer`. What is a
// master may be written in its own place, as it is where that is given as `buffer`.
OPTIM_EXT_SHARED void join(Precision precision, Storage storage, const uint16_t* param, const void* twin, int64_t n,
                           float* buffer) {
  const bool is_bf16 = storage == Storage::bf16;
  if (precision == Precision::master) {
    const float* const master = static_cast<const float*>(twin);
    if (is_bf16) {
      OPTIM_EXT_FOR(i, n) buffer[i] = healed_bf16(master[i], param[i]);
    } else {
      OPTIM_EXT_FOR(i, n) buffer[i] = healed_f16(master[i], param[i]);
    }
    return;
  }
  if (precision == Precision::remainder) {
    const int16_t* const remainder = static_cast<const int16_t*>(twin);
    OPTIM_EXT_FOR(i, n) buffer[i] = join_master(param[i], remainder[i]);
    return;
  }
  const uint16_t* const lost = static_cast<const uint16_t*>(twin);
  if (is_bf16) {
    OPTIM_EXT_FOR(i, n) buffer[i] = join_compensated_bf16(param[i], lost[i]);
  } else {
    OPTIM_EXT_FOR(i, n) buffer[i] = join_compensated_f16(param[i], lost[i]);
  }
}

// The bits of the largest magnitude. Where it is small enough a codec has nothing to choose, and the loop is shorter
// than one that chooses; as integers these are compared in packs.
OPTIM_EXT_INLINE uint32_t largest_magnitude(const float* value, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = static_cast<int32_t>(float_to_bits(value[i]) & kMagnitude);
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<uint32_t>(largest);
}

OPTIM_EXT_SHARED void split(Precision precision, Storage storage, const float* value, int64_t n, uint16_t* param,
                            void* twin) {
  const bool is_bf16 = storage == Storage::bf16;
  if (precision == Precision::master) return narrow(value, param, storage, {1, n, 1, 1});
  if (precision == Precision::remainder) {
    int16_t* const remainder = static_cast<int16_t*>(twin);
    if (largest_magnitude(value, n) <= kInfinity) {
      OPTIM_EXT_FOR(i, n) {
        const SplitMaster master = split_number(float_to_bits(value[i]));
        param[i] = master.param;
        remainder[i] = master.remainder;
      }
      return;
    }
    OPTIM_EXT_FOR(i, n) {
      const SplitMaster master = split_master(value[i]);
      param[i] = master.param;
      remainder[i] = master.remainder;
    }
    return;
  }
  uint16_t* const lost = static_cast<uint16_t*>(twin);
  // Two loops, as a choice within one would keep it from being packed.
  if (is_bf16) {
    OPTIM_EXT_FOR(i, n) {
      const CompensatedValue pair = compensate_bf16(value[i]);
      param[i] = pair.param;
      lost[i] = pair.compensation;
    }
  } else {
    OPTIM_EXT_FOR(i, n) {
      const CompensatedValue pair = compensate_f16(value[i]);
      param[i] = pair.param;
      lost[i] = pair.compensation;
    }
  }
}

// The words of elements from `index` on.
OPTIM_EXT_SHARED void draw(uint64_t key, int64_t index, int64_t n, uint32_t* words) {
  for (int64_t done = 0, many; done < n; done += many) {
    const RandomWords word(key, index + done);
    const auto first = static_cast<uint32_t>(index + done);
    const int64_t left = (int64_t{1} << 32) - static_cast<int64_t>(first);
    many = n - done < left ? n - done : left;
    uint32_t* const to = words + done;
    OPTIM_EXT_FOR(i, many) to[i] = word(first + static_cast<uint32_t>(i));
  }
}

// The same for elements of a part, which have the words that they have in the whole.
OPTIM_EXT_SHARED void draw_of_part(const Companions& companions, int64_t index, int64_t n, uint32_t* words) {
  const int last = companions.place_ndim - 1;
  const int64_t* const dims = companions.place + 1;
  for (int64_t done = 0, many; done < n; done += many) {
    int64_t rest = index + done, at = companions.place[0];
    many = n - done;
    for (int d = last; d >= 0; --d) {
      const int64_t size = dims[2 * d], stride = dims[2 * d + 1], outer = rest / size, place = rest - outer * size;
      const int64_t in_a_row = stride == 1 ? size - place : 1;
      if (d == last && many > in_a_row) many = in_a_row;
      at += place * stride;
      rest = outer;
    }
    draw(companions.key, at, many, words + done);
  }
}

template <class RandomOf>
OPTIM_EXT_INLINE void narrow_by_chance(const float* value, const uint32_t* words, int64_t n, uint16_t* to,
                                       const RandomOf& random_of) {
  if (largest_magnitude(value, n) < kMayRoundToInfinity) {
    OPTIM_EXT_FOR(i, n) to[i] = narrow_small_bf16_by_chance(value[i], random_of(words[i]));
  } else {
    OPTIM_EXT_FOR(i, n) to[i] = narrow_bf16_by_chance(value[i], random_of(words[i]));
  }
}

// By the bits of each word that serve a parameter or a state.
OPTIM_EXT_SHARED void narrow_by_chance(const float* value, const uint32_t* words, int64_t n, bool is_param,
                                       bool is_positive, uint16_t* to) {
  if (is_param) {
    narrow_by_chance(value, words, n, to, [](uint32_t word) { return word_of_param(word); });
  } else if (is_positive) {
    narrow_by_chance(value, words, n, to, [](uint32_t word) { return word_of_state(word, true, 16); });
  } else {
    narrow_by_chance(value, words, n, to, [](uint32_t word) { return word_of_state(word, false, 16); });
  }
}

// Calls visit(first element in the tile, elements, block) for the blocks of elements [index, index + n), and what these
// have of blocks that reach across either end.
template <class Visit>
OPTIM_EXT_INLINE void over_blocks(const Companions& companions, int64_t index, int64_t n, const Visit& visit) {
  int64_t row = index / companions.row, column = index - row * companions.row;
  for (int64_t i = 0, many; i < n; i += many) {
    const int64_t left = companions.row - column, of_block = kBlock8 - column % kBlock8;
    many = left < of_block ? left : of_block;
    if (many > n - i) many = n - i;
    visit(i, many, row * companions.blocks_of_row + column / kBlock8);
    column += many;
    if (column == companions.row) {
      column = 0;
      ++row;
    }
  }
}

OPTIM_EXT_INLINE void decode_block(const uint8_t* from, uint8_t exponent, bool has_sign, int64_t n, float* buffer) {
  if (has_sign) {
    OPTIM_EXT_FOR(i, n) buffer[i] = decode_signed8(from[i], exponent);
  } else {
    OPTIM_EXT_FOR(i, n) buffer[i] = decode_positive8(from[i], exponent);
  }
}

OPTIM_EXT_SHARED void decode(const Companions& companions, int k, const void* codes, int64_t index, int64_t n,
                             float* buffer) {
  const uint8_t* const from = static_cast<const uint8_t*>(codes) + index;
  const uint8_t* const exponents = companions.exponents[k];
  const bool has_sign = !((companions.positive >> k) & 1u);
  over_blocks(companions, index, n, [=](int64_t first, int64_t many, int64_t block) {
    if (many == kBlock8) {  // of a length that the compiler knows
      decode_block(from + first, exponents[block], has_sign, kBlock8, buffer + first);
    } else {
      decode_block(from + first, exponents[block], has_sign, many, buffer + first);
    }
  });
}

// Gives the block's exponent.
OPTIM_EXT_INLINE uint8_t encode_block(const float* value, const uint32_t* words, bool has_sign, int64_t n,
                                      uint8_t* to) {
  const uint8_t exponent = exponent_of_block(largest_magnitude(value, n));
  if (has_sign) {
    OPTIM_EXT_FOR(i, n) to[i] = encode_signed8(value[i], exponent, word_of_state(words[i], false, 20));
  } else {
    OPTIM_EXT_FOR(i, n) to[i] = encode_positive8(value[i], exponent, word_of_state(words[i], true, 20));
  }
  return exponent;
}

OPTIM_EXT_SHARED void encode(const Companions& companions, int k, const float* value, const uint32_t* words,
                             void* codes, int64_t index, int64_t n) {
  uint8_t* const to = static_cast<uint8_t*>(codes) + index;
  uint8_t* const exponents = companions.exponents[k];
  const bool has_sign = !((companions.positive >> k) & 1u);
  over_blocks(companions, index, n, [=](int64_t first, int64_t many, int64_t block) {
    exponents[block] = many == kBlock8 ? encode_block(value + first, words + first, has_sign, kBlock8, to + first)
                                       : encode_block(value + first, words + first, has_sign, many, to + first);
  });
}

}  // namespace

inline void sweep_companions(const ReadyRule& ready, const Bundle& bundle, int64_t begin, int64_t end,
                             const Pass& pass) {
  alignas(64) float buffer[kMaxOperands][kTile];
  alignas(64) uint32_t words[kTile];
  alignas(64) uint16_t moved[kTile];  // the parameter, where it is no one piece of memory
  const Companions& companions = *bundle.companions;
  TileOperand<float> operands[kMaxOperands];
  for (int k = 0; k < ready.operands; ++k) {
    if ((ready.used >> k) & 1u) operands[k] = TileOperand<float>(bundle, k);
  }
  const bool is_native = companions.precision == Precision::native, is_dense = operands[0].layout == nullptr;
  const int64_t bytes_of_twin = companions.precision == Precision::master ? sizeof(float) : sizeof(uint16_t);
  const unsigned written = ready.updates | (pass.unscale ? 1u << kGradOperand : 0u);
  const bool writes_param = written & 1u, draws = (companions.by_chance & written) != 0;
  Bundle tile{};
  for (Storage& storage : tile.storage) storage = Storage::f32;
  for (int64_t index = begin, n; index < end; index += n) {
    int64_t stop = end - index < kTile ? end : companions.end_of_piece(index + kTile);
    if (stop > index + kTile) stop = companions.end_of_piece(index + kTile - kBlock8);
    n = stop - index;
    const Start start(bundle.layout, index);
    uint16_t* const param = is_dense ? static_cast<uint16_t*>(bundle.data[0]) + index : moved;
    void* const twin = static_cast<char*>(companions.twin) + index * bytes_of_twin;
    float* at[kMaxOperands] = {};
    for (int k = is_native ? 0 : 1; k < ready.operands; ++k) {
      if (!((ready.used >> k) & 1u)) continue;
      if (bundle.storage[k] == Storage::q8) {
        decode(companions, k, bundle.data[k], index, n, at[k] = buffer[k]);
      } else {
        at[k] = operands[k].open(start, n, buffer[k]);
      }
    }
    if (!is_native) {
      if (!is_dense) {
        operands[0].load(start, n, buffer[0]);
        narrow(buffer[0], moved, bundle.storage[0], {1, n, 1, 1});
      }
      at[0] = companions.precision == Precision::master && writes_param ? static_cast<float*>(twin) : buffer[0];
      join(companions.precision, bundle.storage[0], param, twin, n, at[0]);
    }
    for (int k = 0; k < kMaxOperands; ++k) tile.data[k] = at[k];
    tile.numel = n;
    ready.sweep(ready.rule, tile, 0, n, pass);
    if (draws && companions.place != nullptr) {
      draw_of_part(companions, index, n, words);
    } else if (draws) {
      draw(companions.key, index, n, words);
    }
    if (!is_native && writes_param) {
      split(companions.precision, bundle.storage[0], at[0], n, param, twin);
      if (!is_dense) {
        widen(moved, bundle.storage[0], {1, n, 1, 1}, buffer[0]);
        operands[0].store(start, n, buffer[0]);
      }
    }
    for (int k = is_native ? 0 : 1; k < ready.operands; ++k) {
      if (!((written >> k) & 1u)) continue;
      if (bundle.storage[k] == Storage::q8) {
        encode(companions, k, at[k], words, bundle.data[k], index, n);
        continue;
      }
      if (bundle.storage[k] == Storage::bf16 && ((companions.by_chance >> k) & 1u)) {
        uint16_t* const to = operands[k].layout ? moved : static_cast<uint16_t*>(bundle.data[k]) + index;
        narrow_by_chance(at[k], words, n, k == 0, (companions.positive >> k) & 1u, to);
        if (operands[k].layout == nullptr) continue;
        widen(moved, Storage::bf16, {1, n, 1, 1}, at[k]);
      }
      operands[k].close(start, n, at[k]);
    }
  }
}

inline void read_kept(const Bundle& bundle, int64_t begin, int64_t end, float* to) {
  const Companions& companions = *bundle.companions;
  const TileOperand<float> param(bundle, 0);
  const int64_t bytes_of_twin = companions.precision == Precision::master ? sizeof(float) : sizeof(uint16_t);
  for (int64_t index = begin, n; index < end; index += n, to += n) {
    n = end - index < kTile ? end - index : kTile;
    alignas(64) uint16_t moved[kTile];
    const uint16_t* at = static_cast<const uint16_t*>(bundle.data[0]) + index;
    if (param.layout != nullptr) {
      param.load(Start(bundle.layout, index), n, to);
      narrow(to, moved, bundle.storage[0], {1, n, 1, 1});
      at = moved;
    }
    const char* const twin = static_cast<const char*>(companions.twin) + index * bytes_of_twin;
    join(companions.precision, bundle.storage[0], at, twin, n, to);
  }
}

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
