// What a block of a sweep does where parameters and state are kept in another way than the rule sees them: as
// sweep_block.h, with the codecs of storage/ where memory is opened and closed. The rule computes in float.
//
// A thread has kPack elements at a time, and the kBlock8 / kPack lanes beside it the rest of a block of q8: 8 lanes of
// 8 elements side by side, or, where elements lie anywhere, 32 lanes of 2. These lanes find the block's largest element
// among them. Positions (KeptHead) without an element take part in nothing else.
#pragma once

#include "../../device/kernel.h"
#include "kept_words.h"

namespace optim_ext::cuda {

template <class Rule>
struct KeptBlock : Block<Rule> {
  KeptHead kept;
  uint8_t* exponents[kSlots<Rule>];
  const int64_t* place;
  uint64_t key;
  unsigned by_chance, positive;  // a bit for each operand
  bool draws;
};

// As open_block().
template <class Rule>
OPTIM_EXT_HOST_DEVICE void open_kept_block(const Batch<Rule>& batch, const unsigned char* table, int64_t index,
                                           KeptBlock<Rule>& block) {
  const auto* const entry = open_entry<KeptEntry<Rule>, Rule>(batch, table, index, block);
  if (entry == nullptr) return;
  const KeptHead& kept = entry->kept;
  block.kept = kept;
  for (int s = 0; s < kSlots<Rule>; ++s) block.exponents[s] = entry->exponents[s];
  block.place = kept.place == 0 ? nullptr : reinterpret_cast<const int64_t*>(table + kept.place);
  block.key = 0;
  block.by_chance = block.positive = 0;
  if (kept.key != nullptr) {
    const RoundingKey key = *kept.key;
    const uint64_t draws = static_cast<uint64_t>(key.draws) + (kept.counts_later ? 1 : 0);
    block.key = key_at_step(static_cast<uint64_t>(key.key), draws);
    block.by_chance = key.rounded() & kept.by_chance;
    block.positive = key.positive();
  }
  block.draws = (block.by_chance & Rule::kUpdates) != 0;
}

// The first element at a position or after it.
template <class Rule>
OPTIM_EXT_HOST_DEVICE int64_t element_from(const KeptBlock<Rule>& block, int64_t position) {
  const int64_t row = block.kept.row;
  if (row == 0) return position;
  const int64_t filled = (row + kBlock8 - 1) / kBlock8 * kBlock8, number = position / filled;
  const int64_t in_row = position - number * filled;
  return number * row + (in_row < row ? in_row : row);
}

// open_average() for the elements of a kept block's positions.
template <class Rule>
OPTIM_EXT_HOST_DEVICE void open_kept_average(const Batch<Rule>& batch, const unsigned char* table,
                                             const KeptBlock<Rule>& block, Block<rules::Average>& average) {
  open_average<Rule>(batch, table, block, average);
  if (average.skip) return;
  average.begin = element_from(block, block.begin);
  average.size = static_cast<int32_t>(element_from(block, block.begin + block.size) - average.begin);
  if (average.begin % 8 != 0) average.entry.vector = false;  // a piece begins where a chunk of positions does
}

// A thread's elements.
template <int kPack>
struct Share {
  static constexpr int kLanesOfBlock = static_cast<int>(kBlock8) / kPack;
  static constexpr int kApart = kPack == 8 ? 1 : kLanesOfBlock;

  int64_t index;  // of the first one, among those that are stepped
  int64_t block;  // of q8
  int32_t left;   // how many there are from the first one on in the row, or in the piece; 0 or less: none
  bool leads;     // the first of the lanes that share the block

  // Of eight, all or none.
  OPTIM_EXT_HOST_DEVICE bool has(int j) const { return kPack == 8 ? left > 0 : j * kApart < left; }
};

template <int kPack, class Rule>
OPTIM_EXT_HOST_DEVICE Share<kPack> share_of(const KeptBlock<Rule>& block, int32_t start, int32_t to, int thread) {
  constexpr int kLanesOfBlock = Share<kPack>::kLanesOfBlock;
  const int lane = thread % kLanesOfBlock;
  const int32_t first = start + thread / kLanesOfBlock * static_cast<int>(kBlock8) + (kPack == 8 ? lane * kPack : lane);
  const int64_t position = block.begin + first;
  Share<kPack> share{position, position / kBlock8, to - first, lane == 0};
  if (block.kept.row != 0) {
    const int64_t row = block.kept.row, filled = (row + kBlock8 - 1) / kBlock8 * kBlock8, number = position / filled;
    const int64_t in_row = position - number * filled, left = row - in_row;
    share.index = number * row + in_row;
    if (left < share.left) share.left = static_cast<int32_t>(left);
  }
  return share;
}

// Elements as they are stored, a word for each. Eight that lie side by side are read at once, as `width` bytes each,
// and parted when they are used: no load then waits for another's conversion.
struct __attribute__((aligned(8), may_alias)) TwoWords {
  uint32_t word[2];
};

OPTIM_EXT_HOST_DEVICE void load_eight(const void* data, int64_t width, int64_t index, uint32_t* word) {
  const char* const from = static_cast<const char*>(data) + index * width;
  if (width == 1) {
    const TwoWords two = *reinterpret_cast<const TwoWords*>(from);
    word[0] = two.word[0];
    word[1] = two.word[1];
    return;
  }
  const Words first = *reinterpret_cast<const Words*>(from);
  OPTIM_EXT_UNROLL for (int j = 0; j < 4; ++j) word[j] = first.word[j];
  if (width == 2) return;
  const Words second = *reinterpret_cast<const Words*>(from + sizeof(Words));
  OPTIM_EXT_UNROLL for (int j = 0; j < 4; ++j) word[4 + j] = second.word[j];
}

// Last ones first: the words of the others are not written yet.
OPTIM_EXT_HOST_DEVICE void part_eight(int64_t width, uint32_t* word) {
  if (width == 2) {
    OPTIM_EXT_UNROLL for (int j = 7; j >= 0; --j) word[j] = (word[j / 2] >> (j % 2 * 16)) & 0xffffu;
  } else if (width == 1) {
    OPTIM_EXT_UNROLL for (int j = 7; j >= 0; --j) word[j] = (word[j / 4] >> (j % 4 * 8)) & 0xffu;
  }
}

OPTIM_EXT_HOST_DEVICE void store_eight(void* data, int64_t width, int64_t index, const uint32_t* word) {
  char* const to = static_cast<char*>(data) + index * width;
  if (width == 1) {
    TwoWords two;
    OPTIM_EXT_UNROLL for (int j = 0; j < 2; ++j) two.word[j] =
        word[4 * j] | word[4 * j + 1] << 8 | word[4 * j + 2] << 16 | word[4 * j + 3] << 24;
    *reinterpret_cast<TwoWords*>(to) = two;
    return;
  }
  Words first, second;
  OPTIM_EXT_UNROLL for (int j = 0; j < 4; ++j) {
    first.word[j] = width == 2 ? word[2 * j] | word[2 * j + 1] << 16 : word[j];
    second.word[j] = word[4 + j];
  }
  *reinterpret_cast<Words*>(to) = first;
  if (width == 4) *reinterpret_cast<Words*>(to + sizeof(Words)) = second;
}

// Where an element is in the whole that a tensor is a part of.
OPTIM_EXT_HOST_DEVICE int64_t index_in_whole(const int64_t* place, int ndim, int64_t index) {
  if (place == nullptr) return index;
  int64_t at = place[0];
  OPTIM_EXT_ROLLED for (int d = ndim - 1; d > 0; --d) {
    const int64_t size = place[1 + 2 * d], rest = index / size;
    at += (index - rest * size) * place[2 + 2 * d];
    index = rest;
  }
  return ndim > 0 ? at + index * place[2] : at;
}

// A call, as it is rare that elements beside each other have not the same words.
OPTIM_EXT_HOST_DEVICE_APART RandomWords words_from(uint64_t key, int64_t index) { return {key, index}; }

// The word of each of a thread's elements; `in_param`: the index of each there.
template <int kPack, class Rule, class InParam>
OPTIM_EXT_HOST_DEVICE void draw(const KeptBlock<Rule>& block, const Share<kPack>& share, const InParam& in_param,
                                uint32_t* word) {
  const auto index_of = [&](int j) { return index_in_whole(block.place, block.kept.place_ndim, in_param(j)); };
  int64_t index = index_of(0);
  uint32_t upper = static_cast<uint32_t>(index >> 32);
  RandomWords words(block.key, index);
  OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
    if (!share.has(j)) continue;
    if (j > 0) index = index_of(j);
    if (static_cast<uint32_t>(index >> 32) != upper) {
      upper = static_cast<uint32_t>(index >> 32);
      words = words_from(block.key, index);
    }
    word[j] = words(static_cast<uint32_t>(index));
  }
}

constexpr unsigned kWholeWarp = 0xffffffffu;

// Closes the share of a state in q8 by the words drawn for it; all lanes of the warp take part.
template <int kPack, class Rule>
OPTIM_EXT_DEVICE void encode(const Share<kPack>& share, uint8_t* exponents, bool is_positive, const float* value,
                             const uint32_t* random, uint32_t* code) {
  uint32_t largest = 0;
  OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
    const uint32_t magnitude = float_to_bits(value[j]) & kMagnitude;
    if (share.has(j) && magnitude > largest) largest = magnitude;
  }
  OPTIM_EXT_UNROLL for (int lanes = Share<kPack>::kLanesOfBlock / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = device::shuffle_xor(kWholeWarp, largest, lanes);
    if (other > largest) largest = other;
  }
  const uint8_t exponent = exponent_of_block(largest);
  if (share.leads && share.left > 0) exponents[share.block] = exponent;
  OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
    const uint32_t bits = word_of_state(random[j], is_positive, 20);
    code[j] = is_positive ? encode_positive8(value[j], exponent, bits) : encode_signed8(value[j], exponent, bits);
  }
}

// The block of q8 that an element of a parameter is in.
OPTIM_EXT_HOST_DEVICE int64_t block_of(const KeptHead& kept, int64_t index) {
  if (kept.row == 0) return index / kBlock8;
  const int64_t number = index / kept.row, blocks_of_row = (kept.row + kBlock8 - 1) / kBlock8;
  return number * blocks_of_row + (index - number * kept.row) / kBlock8;
}

// This thread's share of positions [from, to) of the block's piece. All lanes of a warp go through it as many times.
// kRows: of a sparse gradient.
template <int kPack, bool kRows, class Rule>
OPTIM_EXT_DEVICE void sweep_kept_range(const KeptBlock<Rule>& block, const Rule& rule, int32_t from, int32_t to,
                                       int thread) {
  using Mine = Share<kPack>;
  constexpr int kCount = kSlots<Rule>;
  constexpr bool kInEights = kPack == 8;
  const KeptHead kept = block.kept;
  const bool has_twin = kept.precision != Precision::native;
  const int64_t width_of_twin_here = width_of_twin(kept.precision);
  const Storage of_param = block.entry.storage[0];
  const auto is_in_order = [&](int operand) { return kInEights || ((kept.in_order >> operand) & 1u); };
  for (int32_t start = from; start < to; start += kThreads * kPack) {
    Mine share = share_of<kPack>(block, start, to, thread);
    // Where each operand has each element.
    int64_t at[kInEights ? 1 : kCount][kInEights ? 1 : kPack];
    if constexpr (!kInEights) {
      OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
        int64_t index = share.index + j * Mine::kApart;
        OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) at[s][j] = block.layout ? 0 : index;
        if (block.layout == nullptr || !share.has(j)) continue;
        const Layout& layout = *block.layout;
        OPTIM_EXT_ROLLED for (int d = layout.ndim - 1; d >= 0; --d) {
          const int64_t rest = index / layout.sizes[d], place = index - rest * layout.sizes[d];
          OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
            at[s][j] += layout.place(operand_of<Rule>(s), d, place) * layout.strides[operand_of<Rule>(s)][d];
          }
          index = rest;
        }
      }
    }
    const auto load = [&](const void* data, int64_t width, const int64_t* places, uint32_t* word) {
      if constexpr (kInEights) {
        if (share.left > 0) load_eight(in_global(const_cast<void*>(data)), width, share.index, word);
      } else {
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
          if (share.has(j)) word[j] = load_one(in_global(const_cast<void*>(data)), width, places[j]);
        }
      }
    };
    const auto store = [&](void* data, int64_t width, const int64_t* places, const uint32_t* word) {
      if constexpr (kInEights) {
        if (share.left > 0) store_eight(in_global(data), width, share.index, word);
      } else {
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
          if (share.has(j)) store_one(in_global(data), width, places[j], word[j]);
        }
      }
    };
    const auto places_of = [&](int s) { return kInEights ? at[0] : at[kInEights ? 0 : s]; };
    // The index of each element in the parameter, which twins, words and blocks go by. Of a sparse gradient the rows
    // lie anywhere there, and it is where the parameter itself has the element; a block of q8 is within one row.
    const auto in_param = [&](int j) { return kRows ? at[0][kRows ? j : 0] : share.index + j * Mine::kApart; };
    int64_t in_order[kInEights ? 1 : kPack];
    if constexpr (!kInEights) {
      OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) in_order[j] = in_param(j);
      if (kRows && share.leads) share.block = block_of(kept, in_order[0]);
    }

    // What memory holds.
    uint32_t word[kCount][kPack] = {}, of_twin[kPack] = {}, exponent[kCount] = {};
    OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
      const Storage storage = block.entry.storage[s];
      load(block.entry.data[s], bytes_of(storage), places_of(s), word[s]);
      if (operand_of<Rule>(s) > kGradOperand && storage == Storage::q8 && share.leads && share.left > 0)
        exponent[s] = block.exponents[s][share.block];
    }
    if (has_twin) load(kept.twin, width_of_twin_here, in_order, of_twin);

    // What the rule sees.
    float value[kCount][kPack];
    OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
      const Storage storage = block.entry.storage[s];
      if constexpr (kInEights) part_eight(bytes_of(storage), word[s]);
      if (operand_of<Rule>(s) > kGradOperand && storage == Storage::q8) {
        const auto of_block =
            static_cast<uint8_t>(device::shuffle_from(kWholeWarp, exponent[s], 0, Mine::kLanesOfBlock));
        const bool is_positive = (block.positive >> operand_of<Rule>(s)) & 1u;
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
          const auto code = static_cast<uint8_t>(word[s][j]);
          value[s][j] = is_positive ? decode_positive8(code, of_block) : decode_signed8(code, of_block);
        }
      } else if (s == 0 && has_twin) {
        if constexpr (kInEights) part_eight(width_of_twin_here, of_twin);
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
          const uint32_t param = is_in_order(0) ? word[0][j] : moved(of_param, word[0][j]);
          value[0][j] = joined(kept.precision, of_param, param, of_twin[j]);
        }
      } else {
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) value[s][j] = opened(storage, word[s][j]);
      }
    }
    if (block.unscale) {
      const Storage storage = block.entry.storage[kGradSlot];
      OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
        value[kGradSlot][j] = value[kGradSlot][j] / block.grad_scale;
        word[kGradSlot][j] = closed(storage, value[kGradSlot][j]);
      }
      store(block.entry.data[kGradSlot], bytes_of(storage), places_of(kGradSlot), word[kGradSlot]);
    }

    const auto grad_factor = static_cast<float>(block.grad_factor);
    OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
      float of_element[kCount];
      OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) of_element[s] = value[s][j];
      apply<Rule, float>(rule, of_element, grad_factor, std::make_integer_sequence<int, Rule::kOperands>{});
      OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) value[s][j] = of_element[s];
    }

    uint32_t random[kPack] = {};
    if (block.draws) draw<kPack>(block, share, in_param, random);
    OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
      if (!is_updated<Rule>(s)) continue;
      const Storage storage = block.entry.storage[s];
      const bool is_positive = (block.positive >> operand_of<Rule>(s)) & 1u;
      uint32_t made[kPack];
      if (operand_of<Rule>(s) > kGradOperand && storage == Storage::q8) {
        encode<kPack, Rule>(share, block.exponents[s], is_positive, value[s], random, made);
      } else if (s == 0 && has_twin) {
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
          const SplitWords words = split(kept.precision, storage, value[s][j]);
          made[j] = is_in_order(0) ? words.param : moved(storage, words.param);
          of_twin[j] = words.twin;
        }
        store(kept.twin, width_of_twin_here, in_order, of_twin);
      } else if (storage == Storage::bf16 && ((block.by_chance >> operand_of<Rule>(s)) & 1u)) {
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
          const uint32_t bits = s == 0 ? word_of_param(random[j]) : word_of_state(random[j], is_positive, 16);
          const uint32_t half = narrow_bf16_by_chance(value[s][j], bits);
          made[j] = is_in_order(operand_of<Rule>(s)) ? half : moved(storage, half);
        }
      } else {
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) made[j] = closed(storage, value[s][j]);
      }
      store(block.entry.data[s], bytes_of(storage), places_of(s), made);
    }
  }
}

// Done by every thread of an open block.
template <class Rule>
OPTIM_EXT_DEVICE void sweep_kept_thread(const KeptBlock<Rule>& block, int thread) {
  const Rule rule = block.rule;
  if (block.layout != nullptr && block.layout->rows != nullptr)
    return sweep_kept_range<2, true>(block, rule, 0, block.size, thread);
  int32_t done = 0;
  if (block.kept.vector) {
    done = block.size & -8;
    sweep_kept_range<8, false>(block, rule, 0, done, thread);
  }
  sweep_kept_range<2, false>(block, rule, done, block.size, thread);  // the rest, or everything
}

// One kernel whether steps average or not: it has the registers for that. Without `kMayAverage` it is for those that do
// not, which is less to compile.
template <class Rule, bool kMayAverage = true, int64_t kBytes>
OPTIM_EXT_DEVICE void sweep_kept_block(const Args<Rule, kBytes>& args) {
  OPTIM_EXT_SHARED(block, KeptBlock<Rule>);
  const unsigned char* const table = args.batch.remote ? args.batch.remote : args.room;
  if (device::thread_x() == 0) open_kept_block(args.batch, table, device::block_x(), block);
  device::barrier();
  if (block.skip) return;
  sweep_kept_thread(block, static_cast<int>(device::thread_x()));
  if (!kMayAverage || !args.batch.averaged) return;
  OPTIM_EXT_SHARED(average, Block<rules::Average>);
  if (device::thread_x() == 0) open_kept_average(args.batch, table, block, average);
  device::barrier();
  if (!average.skip) average_thread(average, static_cast<int>(device::thread_x()));
}

}  // namespace optim_ext::cuda
