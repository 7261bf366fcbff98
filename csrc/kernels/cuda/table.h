// The host's side of batch.h: arguments and tables of a rule whose type need not be known.
#pragma once

#include <cstring>
#include <new>

#include "batch.h"

namespace optim_ext::cuda {

// Arguments as Args has them.
struct alignas(8) Packed {
  static constexpr int64_t kRest = kArgumentBytes - static_cast<int64_t>(sizeof(BatchHead));
  BatchHead batch;
  unsigned char rest[kRest];  // the rule, then the table

  Packed() : batch{} {}  // the room that no table fills stays as it is

  unsigned char* table(const RuleShape& shape) { return rest + shape.bytes; }
  static int64_t room(const RuleShape& shape) { return kRest - shape.bytes; }

  template <class Rule>
  Rule& put(const Rule& rule) {
    return *::new (static_cast<void*>(rest)) Rule(rule);
  }
  template <class Rule>
  const Args<Rule, kArgumentBytes>& as() const {
    static_assert(sizeof(Args<Rule, kArgumentBytes>) == sizeof(Packed) && shape_of<Rule>().bytes < kRest);
    return *reinterpret_cast<const Args<Rule, kArgumentBytes>*>(this);
  }
};

// A table: the first chunk of each entry, the entries, the layouts they need.
struct TableShape {
  RuleShape rule;
  int64_t count = 0, layouts = 0;

  int64_t layouts_at() const { return entries_at(count) + count * rule.entry_bytes(); }
  int64_t bytes() const { return layouts_at() + layouts * static_cast<int64_t>(sizeof(Layout)); }
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

// Whether all operands can be taken 16 bytes at a time, which ask for one storage and a dense order.
inline bool in_vectors(const Bundle& bundle, unsigned used) {
  bool fits = bundle.layout == nullptr;
  for (int operand = 0; operand < kMaxOperands; ++operand) {
    if (!((used >> operand) & 1u)) continue;
    fits &= bundle.storage[operand] == bundle.storage[0] && reinterpret_cast<uintptr_t>(bundle.data[operand]) % 16 == 0;
  }
  return fits;
}

inline void write_entry(const Bundle& bundle, const RuleShape& rule, int32_t layout, int32_t average_layout,
                        unsigned char* to) {
  EntryHead entry{};
  entry.numel = bundle.numel;
  entry.step = bundle.step;
  entry.device_step = bundle.device_step;
  entry.step_storage = bundle.step_storage;
  entry.layout = layout;
  entry.vector = in_vectors(bundle, rule.used);
  if (bundle.average) {
    entry.average = bundle.average->data[0];
    entry.average_storage = bundle.average->storage[0];
    entry.average_vector = in_vectors(*bundle.average, rules::Average::kUsed);
    entry.average_layout = average_layout;
  }
  unsigned char* const scalars = to + sizeof entry;
  unsigned char* const data = scalars + sizeof(ScalarState) * static_cast<size_t>(rule.scalars);
  std::memcpy(scalars, bundle.scalars, static_cast<size_t>(data - scalars));
  for (int s = 0; s < rule.slots(); ++s) {
    const int operand = nth_operand(rule.used, s);
    entry.storage[s] = bundle.storage[operand];
    std::memcpy(data + sizeof(void*) * static_cast<size_t>(s), &bundle.data[operand], sizeof(void*));
  }
  std::memcpy(to, &entry, sizeof entry);
}

// Writes the table of `count` bundles to `to` (TableShape says how large) and returns how many chunks they make, which
// is the number of blocks to launch.
inline int64_t fill_table(const Bundle* const* bundles, const TableShape& shape, int64_t chunk, unsigned char* to) {
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
    write_entry(bundle, shape.rule, layout, place(bundle.average ? bundle.average->layout : nullptr),
                to + entries_at(shape.count) + i * shape.rule.entry_bytes());
    chunks += (bundle.numel + chunk - 1) / chunk;
  }
  return chunks;
}

// The longest run of bundles, from the first, whose table fits into `room` bytes.
inline TableShape fitting(const RuleShape& rule, const Bundle* const* bundles, int64_t count, int64_t room) {
  TableShape shape{rule};
  while (shape.count < count) {
    TableShape longer = shape;
    longer.add(*bundles[shape.count]);
    if (longer.bytes() > room) break;
    shape = longer;
  }
  return shape;
}

}  // namespace optim_ext::cuda
