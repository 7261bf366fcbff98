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

// The numbers of Companions::place.
inline int64_t bytes_of_place(const Companions* companions) {
  return companions == nullptr || companions->place == nullptr ? 0 : 8 * (1 + 2 * int64_t{companions->place_ndim});
}

// A table: the first chunk of each entry, the entries, the layouts and places they need.
struct TableShape {
  RuleShape rule;
  int64_t count = 0, layouts = 0, bytes_of_places = 0;

  int64_t layouts_at() const { return entries_at(count) + count * rule.entry_bytes(); }
  int64_t places_at() const { return layouts_at() + layouts * static_cast<int64_t>(sizeof(Layout)); }
  int64_t bytes() const { return places_at() + bytes_of_places; }
  void add(const Bundle& bundle) {
    ++count;
    layouts += (bundle.layout != nullptr) + (bundle.average && bundle.average->layout);
    if (rule.kept) bytes_of_places += bytes_of_place(bundle.companions);
  }
};

// How many positions a kept entry has (KeptHead).
inline int64_t positions_of(const Bundle& bundle) {
  const Companions& companions = *bundle.companions;
  if (companions.row % kBlock8 == 0) return bundle.numel;
  return bundle.numel / companions.row * companions.blocks_of_row * kBlock8;
}

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

// Whether all operands, and what lies beside them, can be taken 8 elements at a time.
inline bool in_eights(const Bundle& bundle, unsigned used) {
  const auto fits = [](const void* data, int64_t width) {
    return reinterpret_cast<uintptr_t>(data) % (width == 1 ? 8 : 16) == 0;
  };
  const Companions& companions = *bundle.companions;
  bool all = bundle.layout == nullptr && companions.row % 8 == 0 && fits(companions.twin, 2);
  for (int operand = 0; operand < kMaxOperands; ++operand)
    all &= !((used >> operand) & 1u) || fits(bundle.data[operand], bytes_of(bundle.storage[operand]));
  return all;
}

// What follows an entry; `place`: where its place lies in the table.
inline void write_kept(const Bundle& bundle, const RuleShape& rule, int32_t place, unsigned char* to) {
  const Companions& companions = *bundle.companions;
  KeptHead kept{};
  kept.twin = companions.twin;
  kept.key = companions.live_key;
  kept.row = companions.row % kBlock8 != 0 ? companions.row : 0;
  kept.place = place;
  kept.place_ndim = companions.place_ndim;
  kept.precision = companions.precision;
  kept.by_chance = static_cast<uint16_t>(companions.by_chance);
  kept.counts_later = companions.counts_later;
  // Beside a sparse gradient all others are in order, and their indices are those of the whole parameter.
  const bool in_order = bundle.layout == nullptr || bundle.layout->rows != nullptr;
  for (int k = 0; k < kMaxOperands; ++k) {
    if (in_order || bundle.layout->is_dense(k)) kept.in_order |= static_cast<uint16_t>(1u << k);
  }
  kept.vector = in_eights(bundle, rule.used);
  std::memcpy(to, &kept, sizeof kept);
  for (int s = 0; s < rule.slots(); ++s) {
    std::memcpy(to + sizeof kept + sizeof(void*) * static_cast<size_t>(s),
                &companions.exponents[nth_operand(rule.used, s)], sizeof(void*));
  }
}

inline void write_entry(const Bundle& bundle, const RuleShape& rule, int32_t layout, int32_t average_layout,
                        unsigned char* to) {
  EntryHead entry{};
  entry.numel = rule.kept ? positions_of(bundle) : bundle.numel;
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
  int64_t chunks = 0, layout_at = shape.layouts_at(), place_at = shape.places_at();
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
    unsigned char* const entry = to + entries_at(shape.count) + i * shape.rule.entry_bytes();
    write_entry(bundle, shape.rule, layout, place(bundle.average ? bundle.average->layout : nullptr), entry);
    if (shape.rule.kept) {
      const int64_t bytes = bytes_of_place(bundle.companions);
      if (bytes > 0) std::memcpy(to + place_at, bundle.companions->place, static_cast<size_t>(bytes));
      const int64_t of_head = shape.rule.entry_bytes() - sizeof(KeptHead) - 8 * int64_t{shape.rule.slots()};
      write_kept(bundle, shape.rule, bytes > 0 ? static_cast<int32_t>(place_at) : 0, entry + of_head);
      place_at += bytes;
    }
    chunks += ((shape.rule.kept ? positions_of(bundle) : bundle.numel) + chunk - 1) / chunk;
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
