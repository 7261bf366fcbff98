// What one thread of one block does, start to end. It compiles as plain C++ too, so that a test can run every block and
// thread on the host and compare memory with the CPU sweep: block, thread -> tensor, element, and the update itself.
#pragma once

#include <type_traits>
#include <utility>

#include "../convert.h"
#include "batch.h"

#if defined(__CUDACC__)
#define OPTIM_EXT_HOST_DEVICE_APART static __host__ __device__ __noinline__
#define OPTIM_EXT_UNROLL _Pragma("unroll")
#define OPTIM_EXT_ROLLED _Pragma("unroll 1")
#else
#define OPTIM_EXT_HOST_DEVICE_APART inline
#define OPTIM_EXT_UNROLL
#define OPTIM_EXT_ROLLED
#endif

namespace optim_ext::cuda {

constexpr int kGradSlot = kGradOperand;  // parameter and gradient are in every rule, so no operand before is missing

// What the threads of a block share: their piece of one tensor, and the rule as it stands at that tensor's step.
template <class Rule>
struct Block {
  Rule rule;
  Entry<Rule> entry;
  const Layout* layout;
  int64_t begin;  // the piece: elements [begin, begin + size) of the tensor
  int32_t size;
  double grad_factor;
  float grad_scale;
  bool unscale, skip;
};

template <class Rule>
OPTIM_EXT_HOST_DEVICE bool is_skipped(const Batch<Rule>& batch) {
  return batch.controls.found_inf != nullptr && *batch.controls.found_inf == 1.0f;
}

// The rule as it stands at the step of one tensor. `after` takes the scalar state after it.
template <class Rule>
OPTIM_EXT_HOST_DEVICE Rule ready_rule(const Batch<Rule>& batch, const Entry<Rule>& entry, rules::Scalar* after) {
  Rule rule = batch.rule;
  if constexpr (sizeof(Rule) >= sizeof(double)) {  // it has hyper-parameters at all
    for (int32_t i = 0; i < batch.hyper_count; ++i) {
      const LiveHyper& hyper = batch.hypers[i];
      const double value = load_element<double>(hyper.value, hyper.storage, 0);
      *reinterpret_cast<double*>(reinterpret_cast<char*>(&rule) + hyper.offset) = value;
    }
  }
  const double on_device = entry.device_step ? load_element<double>(entry.device_step, entry.step_storage, 0) : 0.0;
  const double step = on_device + entry.step;
  if constexpr (rules::kScalarsOf<Rule> == 0) {
    return rule.at_step(step);
  } else {
    for (int k = 0; k < Rule::kScalars; ++k) {
      const ScalarState& scalar = entry.scalars[k];
      after[k].value = scalar.device ? load_element<double>(scalar.device, scalar.storage, 0) : scalar.value;
      after[k].is_double = scalar.storage == Storage::f64;
    }
    return rule.at_step(step, after);
  }
}

template <class Entry>
OPTIM_EXT_HOST_DEVICE const Entry* entries_of(const BatchHead& batch, const unsigned char* table) {
  return reinterpret_cast<const Entry*>(table + entries_at(batch.count));
}

// Stores what the scalar state of one tensor is after the step, once every block has read what it was before.
template <class Rule>
OPTIM_EXT_HOST_DEVICE void store_scalars(const Batch<Rule>& batch, const Entry<Rule>& entry) {
  if (is_skipped(batch)) return;
  rules::Scalar after[kMaxScalars];
  ready_rule(batch, entry, after);
  for (int k = 0; k < Rule::kScalars; ++k) {
    const ScalarState& scalar = entry.scalars[k];
    if (scalar.device) store_element<double>(scalar.device, scalar.storage, 0, after[k].value);
  }
}

// The last entry that starts at or before a chunk, and how many chunks later that is.
struct FoundEntry {
  int32_t number;
  int64_t chunk;
};
OPTIM_EXT_HOST_DEVICE FoundEntry find_entry(const BatchHead& batch, const unsigned char* table, int64_t index) {
  const int32_t* const first_chunk = reinterpret_cast<const int32_t*>(table);
  int32_t found = 0, beyond = batch.count;
  while (beyond - found > 1) {
    const int32_t middle = found + (beyond - found) / 2;
    (first_chunk[middle] <= index ? found : beyond) = middle;
  }
  return {found, index - first_chunk[found]};
}

// Opens the piece that a block works on; gives the entry that it is of, or null where the step is skipped. Done by one
// thread of the block before all others start.
template <class EntryOf, class Rule>
OPTIM_EXT_HOST_DEVICE const EntryOf* open_entry(const Batch<Rule>& batch, const unsigned char* table, int64_t index,
                                                Block<Rule>& block) {
  block.skip = is_skipped(batch);
  if (block.skip) return nullptr;
  const FoundEntry found = find_entry(batch, table, index);
  const EntryOf& entry = entries_of<EntryOf>(batch, table)[found.number];
  block.entry = entry;
  block.layout = block.entry.layout == 0 ? nullptr : reinterpret_cast<const Layout*>(table + block.entry.layout);
  block.begin = found.chunk * batch.chunk;
  const int64_t left = block.entry.numel - block.begin;
  block.size = static_cast<int32_t>(left < batch.chunk ? left : batch.chunk);
  block.unscale = batch.controls.grad_scale != nullptr;
  block.grad_scale = block.unscale ? *batch.controls.grad_scale : 1.0f;
  block.grad_factor = batch.controls.grad_factor
                          ? load_element<double>(batch.controls.grad_factor, batch.controls.grad_factor_storage, 0)
                          : 1.0;
  rules::Scalar after[kMaxScalars];
  block.rule = ready_rule(batch, block.entry, after);
  return &entry;
}

template <class Rule>
OPTIM_EXT_HOST_DEVICE void open_block(const Batch<Rule>& batch, const unsigned char* table, int64_t index,
                                      Block<Rule>& block) {
  open_entry<Entry<Rule>>(batch, table, index, block);
}

// The piece of an open block once more, as what the rule of averages works on: its update and its parameter, walked in
// the same order, so that the block needs nothing but its own update to be finished.
template <class Rule>
OPTIM_EXT_HOST_DEVICE void open_average(const Batch<Rule>& batch, const unsigned char* table, const Block<Rule>& block,
                                        Block<rules::Average>& average) {
  const Entry<Rule>& entry = block.entry;
  average.skip = block.skip || entry.average == nullptr;
  if (average.skip) return;
  average.rule = {batch.controls.average_weight
                      ? load_element<double>(batch.controls.average_weight, batch.controls.average_weight_storage, 0)
                      : batch.average_weight};
  average.entry.data[0] = entry.average;
  average.entry.data[1] = entry.data[0];
  average.entry.storage[0] = entry.average_storage;
  average.entry.storage[1] = entry.storage[0];
  average.entry.vector = entry.average_vector;
  average.layout = entry.average_layout == 0 ? nullptr : reinterpret_cast<const Layout*>(table + entry.average_layout);
  average.begin = block.begin;
  average.size = block.size;
  average.grad_factor = 1.0;
  average.unscale = false;
}

OPTIM_EXT_HOST_DEVICE double bits_to_double(uint64_t bits) { return __builtin_bit_cast(double, bits); }
OPTIM_EXT_HOST_DEVICE uint64_t double_to_bits(double value) { return __builtin_bit_cast(uint64_t, value); }

// Tells the compiler that a pointer read from a table points to device memory, which has loads and stores of its own.
OPTIM_EXT_HOST_DEVICE void* in_global(void* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return data;
}

// Bits are loaded first and widened only when used: no load then waits for another's conversion.
struct __attribute__((aligned(16), may_alias)) Words {
  uint32_t word[4];
};

// 16 bytes of memory with storage S per access. Accesses are addressed from the start of the block's piece, where 32
// bits are enough.
template <class V, Storage S>
struct VectorAccess {
  using Raw = Words;
  static constexpr int kWidth = S == Storage::f64 ? 8 : S == Storage::f32 ? 4 : 2;
  static constexpr int kPack = 16 / kWidth;

  OPTIM_EXT_HOST_DEVICE VectorAccess(void* data, Storage, int64_t begin)
      : piece_(static_cast<char*>(in_global(data)) + begin * kWidth) {}

  OPTIM_EXT_HOST_DEVICE Raw load(int32_t i) const { return *reinterpret_cast<const Words*>(piece_ + i * kWidth); }
  OPTIM_EXT_HOST_DEVICE void store(int32_t i, const Raw& raw) const {
    *reinterpret_cast<Words*>(piece_ + i * kWidth) = raw;
  }
  OPTIM_EXT_HOST_DEVICE V get(const Raw& raw, int j) const {
    if constexpr (S == Storage::f64) {
      return bits_to_double(static_cast<uint64_t>(raw.word[2 * j + 1]) << 32 | raw.word[2 * j]);
    } else if constexpr (S == Storage::f32) {
      return bits_to_float(raw.word[j]);
    } else {
      const uint16_t half = static_cast<uint16_t>(raw.word[j / 2] >> (j % 2 * 16));
      return S == Storage::bf16 ? widen_bf16(half) : widen_f16(half);
    }
  }
  OPTIM_EXT_HOST_DEVICE void put(Raw& raw, int j, V value) const {
    if constexpr (S == Storage::f64) {
      const uint64_t bits = double_to_bits(value);
      raw.word[2 * j] = static_cast<uint32_t>(bits);
      raw.word[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (S == Storage::f32) {
      raw.word[j] = float_to_bits(value);
    } else {
      const uint32_t half = S == Storage::bf16 ? narrow_bf16(value) : narrow_f16(value);
      const int shift = j % 2 * 16;
      raw.word[j / 2] = (raw.word[j / 2] & ~(0xffffu << shift)) | half << shift;
    }
  }

 private:
  char* piece_;
};

// One element at a time, whatever its storage and alignment.
template <class V>
struct ElementAccess {
  static constexpr int kPack = 1;
  using Raw = std::conditional_t<sizeof(V) == 8, uint64_t, uint32_t>;  // the bits as stored; after put(), those of a V

  OPTIM_EXT_HOST_DEVICE ElementAccess(void* data, Storage storage, int64_t begin)
      : piece_(static_cast<char*>(in_global(data)) + begin * bytes_of(storage)), storage_(storage) {}

  OPTIM_EXT_HOST_DEVICE Raw load(int32_t i) const {
    switch (bytes_of(storage_)) {
      case 2: return static_cast<const uint16_t*>(piece_)[i];
      case 4: return float_to_bits(static_cast<const float*>(piece_)[i]);
      default: return static_cast<Raw>(double_to_bits(static_cast<const double*>(piece_)[i]));
    }
  }
  OPTIM_EXT_HOST_DEVICE void store(int32_t i, const Raw& raw) const {
    store_element<V>(piece_, storage_, i, to_value(raw));
  }
  OPTIM_EXT_HOST_DEVICE V get(const Raw& raw, int) const {
    switch (storage_) {
      case Storage::f32: return static_cast<V>(bits_to_float(static_cast<uint32_t>(raw)));
      case Storage::f64: return static_cast<V>(bits_to_double(raw));
      case Storage::bf16: return static_cast<V>(widen_bf16(static_cast<uint16_t>(raw)));
      default: return static_cast<V>(widen_f16(static_cast<uint16_t>(raw)));
    }
  }
  OPTIM_EXT_HOST_DEVICE void put(Raw& raw, int, V value) const {
    if constexpr (sizeof(V) == 8) {
      raw = double_to_bits(value);
    } else {
      raw = float_to_bits(value);
    }
  }

 private:
  OPTIM_EXT_HOST_DEVICE static V to_value(Raw raw) {
    if constexpr (sizeof(V) == 8) {
      return bits_to_double(raw);
    } else {
      return bits_to_float(raw);
    }
  }

  void* piece_;
  Storage storage_;
};

template <class Rule>
OPTIM_EXT_HOST_DEVICE constexpr bool is_updated(int slot) {
  return (Rule::kUpdates >> operand_of<Rule>(slot)) & 1u;
}

// Operand K of an element: for the gradient a value of the rule's own, for one that this variant of the rule does not
// have a scratch value.
template <class Rule, class V, int K>
OPTIM_EXT_HOST_DEVICE decltype(auto) operand_in(V* slots, V& scratch, V grad_factor) {
  if constexpr (K == kGradOperand) {
    return slots[kGradSlot] * grad_factor;
  } else if constexpr ((Rule::kUsed >> K) & 1u) {
    return (slots[slot_of<Rule>(K)]);
  } else {
    return (scratch);
  }
}

template <class Rule, class V, int... K>
OPTIM_EXT_HOST_DEVICE void apply(const Rule& rule, V* slots, V grad_factor, std::integer_sequence<int, K...>) {
  V scratch = V(0);
  rule(operand_in<Rule, V, K>(slots, scratch, grad_factor)...);
}

// This thread's share of elements [from, to) of the block's piece, a whole number of accesses. kUnroll accesses per
// operand are in flight before the first is used.
template <class Access, class Rule, class V, int... S>
OPTIM_EXT_HOST_DEVICE void sweep_range(const Block<Rule>& block, const Rule& rule, int32_t from, int32_t to, int thread,
                                       std::integer_sequence<int, S...>) {
  constexpr int kCount = kSlots<Rule>, kPack = Access::kPack;
  constexpr int kUnroll = kPack >= 8 || kCount > 5 ? 1 : kCount <= 2 ? 4 : 2;
  constexpr int32_t kStride = kThreads * kPack;
  const V grad_factor = V(block.grad_factor);
  const Access access[] = {Access(block.entry.data[S], block.entry.storage[S], block.begin)...};
  for (int32_t start = from + thread * kPack; start < to; start += kUnroll * kStride) {
    typename Access::Raw raw[kUnroll][kCount];
    OPTIM_EXT_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = start + u * kStride;
      if (i >= to) continue;
      OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) raw[u][s] = access[s].load(i);
    }
    V grad[kUnroll][kPack];
    OPTIM_EXT_UNROLL for (int u = 0; u < kUnroll; ++u) {
      if (start + u * kStride >= to) continue;
      OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) grad[u][j] = access[kGradSlot].get(raw[u][kGradSlot], j);
    }
    if (block.unscale) {
      const V scale = V(block.grad_scale);
      OPTIM_EXT_UNROLL for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = start + u * kStride;
        if (i >= to) continue;
        OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
          grad[u][j] = grad[u][j] / scale;
          access[kGradSlot].put(raw[u][kGradSlot], j, grad[u][j]);
        }
        access[kGradSlot].store(i, raw[u][kGradSlot]);
      }
    }
    OPTIM_EXT_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = start + u * kStride;
      if (i >= to) continue;
      OPTIM_EXT_UNROLL for (int j = 0; j < kPack; ++j) {
        V value[kCount];
        OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
          value[s] = s == kGradSlot ? grad[u][j] : access[s].get(raw[u][s], j);
        }
        apply<Rule, V>(rule, value, grad_factor, std::make_integer_sequence<int, Rule::kOperands>{});
        OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
          if (is_updated<Rule>(s)) access[s].put(raw[u][s], j, value[s]);
        }
      }
      OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
        if (is_updated<Rule>(s)) access[s].store(i, raw[u][s]);
      }
    }
  }
}

// The same for operands that do not share one dense order. One division per dimension finds all of them.
template <class Rule, class V>
OPTIM_EXT_HOST_DEVICE void sweep_strided(const Block<Rule>& block, const Rule& rule, int thread) {
  constexpr int kCount = kSlots<Rule>;
  const V grad_factor = V(block.grad_factor);
  const Layout& layout = *block.layout;
  for (int32_t i = thread; i < block.size; i += kThreads) {
    int64_t at[kCount] = {};
    int64_t index = block.begin + i;
    OPTIM_EXT_ROLLED for (int d = layout.ndim - 1; d >= 0; --d) {
      const int64_t rest = index / layout.sizes[d], place = index - rest * layout.sizes[d];
      OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
        at[s] += layout.place(operand_of<Rule>(s), d, place) * layout.strides[operand_of<Rule>(s)][d];
      }
      index = rest;
    }
    V value[kCount];
    OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
      value[s] = load_element<V>(in_global(block.entry.data[s]), block.entry.storage[s], at[s]);
    }
    if (block.unscale) value[kGradSlot] = value[kGradSlot] / V(block.grad_scale);
    apply<Rule, V>(rule, value, grad_factor, std::make_integer_sequence<int, Rule::kOperands>{});
    OPTIM_EXT_UNROLL for (int s = 0; s < kCount; ++s) {
      if (!is_updated<Rule>(s) && !(s == kGradSlot && block.unscale)) continue;
      store_element<V>(in_global(block.entry.data[s]), block.entry.storage[s], at[s], value[s]);
    }
  }
}

// Done by every thread of an open block.
template <class Rule, class V>
OPTIM_EXT_HOST_DEVICE void sweep_thread(const Block<Rule>& block, int thread) {
  static_assert((Rule::kUsed & 3u) == 3u, "every rule has a parameter and a gradient");
  constexpr auto slots = std::make_integer_sequence<int, kSlots<Rule>>{};
  const Rule rule = block.rule;
  if (block.layout) return sweep_strided<Rule, V>(block, rule, thread);
  const int32_t size = block.size;
  int32_t done = 0;
  if (block.entry.vector) {
    const Storage storage = block.entry.storage[0];
    done = size & -static_cast<int32_t>(16 / bytes_of(storage));
    if constexpr (sizeof(V) == 8) {
      sweep_range<VectorAccess<V, Storage::f64>, Rule, V>(block, rule, 0, done, thread, slots);
    } else if (storage == Storage::f32) {
      sweep_range<VectorAccess<V, Storage::f32>, Rule, V>(block, rule, 0, done, thread, slots);
    } else if (storage == Storage::bf16) {
      sweep_range<VectorAccess<V, Storage::bf16>, Rule, V>(block, rule, 0, done, thread, slots);
    } else {
      sweep_range<VectorAccess<V, Storage::f16>, Rule, V>(block, rule, 0, done, thread, slots);
    }
  }
  sweep_range<ElementAccess<V>, Rule, V>(block, rule, done, size, thread, slots);  // the rest, or everything
}

// Done by every thread of a block when all of them have finished its update. What they read of the parameter is still
// in the cache, and this costs the update no registers: it is a function of its own.
OPTIM_EXT_HOST_DEVICE_APART void average_thread(const Block<rules::Average>& block, int thread) {
  const bool in_double = block.entry.storage[0] == Storage::f64 || block.entry.storage[1] == Storage::f64;
  in_double ? sweep_thread<rules::Average, double>(block, thread) : sweep_thread<rules::Average, float>(block, thread);
}

}  // namespace optim_ext::cuda
