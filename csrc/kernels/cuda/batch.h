// What one launch carries: the rule, the values it reads on the device, and a table of the tensors to sweep. Plain C++:
// the CPU tests pack these tables and walk them without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../rules/rule.h"
#include "../../rules/average.h"
#include "../operand.h"

namespace optim_ext::cuda {

constexpr int kThreads = 256;        // per block
constexpr int kMaxLiveHypers = 4;    // hyper-parameters that may be tensors on the device: lr and the betas
constexpr int64_t kMinChunk = 2048;  // elements: what the threads of a block take in one go

// Room for kernel arguments, as drivers since CUDA 12.1 have it on sm_70 and newer. One size for all: every other would
// be all kernels once more.
constexpr int64_t kArgumentBytes = 32760;

// A rule's operands without those its variant does not have: slot s of an entry is the s-th bit set in kUsed.
template <class Rule>
constexpr int kSlots = __builtin_popcount(Rule::kUsed);
template <class Rule>
OPTIM_EXT_HOST_DEVICE constexpr int slot_of(int operand) {
  return __builtin_popcount(Rule::kUsed & ((1u << operand) - 1u));
}
template <class Rule>
OPTIM_EXT_HOST_DEVICE constexpr int operand_of(int slot) {
  int operand = 0;
  while (!((Rule::kUsed >> operand) & 1u) || slot_of<Rule>(operand) != slot) ++operand;
  return operand;
}

// A hyper-parameter that lives on the device; it replaces the double at this offset of the rule.
struct LiveHyper {
  int64_t offset;
  const void* value;
  Storage storage;
};

// The scalar state of one tensor; nothing for rules that have none.
template <int kCount>
struct ScalarStates {
  ScalarState scalars[kCount];
};
template <>
struct ScalarStates<0> {};

// One tensor with its state.
template <class Rule>
struct Entry : ScalarStates<rules::kScalarsOf<Rule>> {
  void* data[kSlots<Rule>];
  int64_t numel;
  double step;              // where the host knows it
  const void* device_step;  // else where it lives (f32 or f64), less `step`; null on the host
  int32_t layout;           // where its Layout lies, in bytes from the start of the table; 0: dense, all in one order
  int32_t average_layout;   // the same for the average and the parameter
  void* average;            // the running average of the updated parameter; null: none
  Storage storage[kSlots<Rule>];
  Storage step_storage, average_storage;
  bool vector, average_vector;  // dense, of one storage, aligned: 16 bytes at a time
};

template <class Rule>
struct Batch {
  Rule rule;
  LiveHyper hypers[kMaxLiveHypers];
  int32_t hyper_count;
  int32_t count;  // entries in the table
  int64_t chunk;  // elements per block, a multiple of kMinChunk
  DeviceControls controls;
  double average_weight;        // of the updated parameter in its average, unless controls say where that lives
  bool averaged;                // some entries have an average
  const unsigned char* remote;  // the table in device memory; null: it follows in the arguments
};

// Kernel arguments of one size, table included.
template <class Rule, int64_t kBytes>
struct alignas(8) Args {
  static constexpr int64_t kRoom = kBytes - static_cast<int64_t>(sizeof(Batch<Rule>));
  Batch<Rule> batch;
  unsigned char room[kRoom];
};

// A table: the first chunk of each entry (int32, compact because it is searched), the entries, the layouts they need.
template <class Rule>
struct TableShape {
  int64_t count = 0, layouts = 0;

  OPTIM_EXT_HOST_DEVICE int64_t entries_at() const { return (count * 4 + 7) / 8 * 8; }
  OPTIM_EXT_HOST_DEVICE int64_t layouts_at() const {
    return entries_at() + count * static_cast<int64_t>(sizeof(Entry<Rule>));
  }
  OPTIM_EXT_HOST_DEVICE int64_t bytes() const { return layouts_at() + layouts * static_cast<int64_t>(sizeof(Layout)); }
  void add(const Bundle& bundle) {
    ++count;
    layouts += (bundle.layout != nullptr) + (bundle.average && bundle.average->layout);
  }
};

// Elements per block: enough blocks to keep every multiprocessor supplied to the end, few enough that opening a block
// (a search and, for Adam, two powers) costs nothing beside its work.
inline int64_t chunk_for(int64_t elements, int multiprocessors) {
  int64_t chunk = kMinChunk;
  while (chunk < 32 * kMinChunk && elements / chunk > 64 * static_cast<int64_t>(multiprocessors)) chunk *= 2;
  return chunk;
}

template <class Rule>
Entry<Rule> make_entry(const Bundle& bundle, int32_t layout, int32_t average_layout) {
  Entry<Rule> entry{};
  entry.numel = bundle.numel;
  entry.step = bundle.step;
  entry.device_step = bundle.device_step;
  entry.step_storage = bundle.step_storage;
  if constexpr (rules::kScalarsOf<Rule> > 0) {
    for (int k = 0; k < Rule::kScalars; ++k) entry.scalars[k] = bundle.scalars[k];
  }
  entry.layout = layout;
  entry.vector = layout == 0;
  for (int s = 0; s < kSlots<Rule>; ++s) {
    const int operand = operand_of<Rule>(s);
    entry.data[s] = bundle.data[operand];
    entry.storage[s] = bundle.storage[operand];
    entry.vector &= entry.storage[s] == entry.storage[0] && reinterpret_cast<uintptr_t>(entry.data[s]) % 16 == 0;
  }
  if (bundle.average) {
    const auto average = make_entry<rules::Average>(*bundle.average, average_layout, 0);
    entry.average = average.data[0];
    entry.average_storage = average.storage[0];
    entry.average_vector = average.vector;
    entry.average_layout = average_layout;
  }
  return entry;
}

// Writes the table of `count` bundles to `to` (TableShape says how large) and returns how many chunks they make, which
// is the number of blocks to launch.
template <class Rule>
int64_t fill_table(const Bundle* const* bundles, const TableShape<Rule>& shape, int64_t chunk, unsigned char* to) {
  int64_t chunks = 0, layout_at = shape.layouts_at();
  const auto place = [&](const Layout* layout) {
    if (layout == nullptr) return 0;
    std::memcpy(to + layout_at, layout, sizeof(Layout));
    layout_at += static_cast<int64_t>(sizeof(Layout));
    return static_cast<int32_t>(layout_at - static_cast<int64_t>(sizeof(Layout)));
  };
  for (int64_t i = 0; i < shape.count; ++i) {
    const Bundle& bundle = *bundles[i];
    const int32_t first = static_cast<int32_t>(chunks);
    std::memcpy(to + i * 4, &first, 4);
    const int32_t layout = place(bundle.layout);
    const Entry<Rule> entry =
        make_entry<Rule>(bundle, layout, place(bundle.average ? bundle.average->layout : nullptr));
    std::memcpy(to + shape.entries_at() + i * static_cast<int64_t>(sizeof entry), &entry, sizeof entry);
    chunks += (bundle.numel + chunk - 1) / chunk;
  }
  return chunks;
}

// The longest run of bundles, from the first, whose table fits into `room` bytes.
template <class Rule>
TableShape<Rule> fitting(const Bundle* const* bundles, int64_t count, int64_t room) {
  TableShape<Rule> shape;
  while (shape.count < count) {
    TableShape<Rule> longer = shape;
    longer.add(*bundles[shape.count]);
    if (longer.bytes() > room) break;
    shape = longer;
  }
  return shape;
}

}  // namespace optim_ext::cuda
