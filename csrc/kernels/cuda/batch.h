// What one launch carries: the rule, the values it reads on the device, and a table of the tensors to sweep. The host
// packs it without the rule's type (table.h), kernels know that. Plain C++: the CPU tests pack these tables and walk
// them without a GPU.
#pragma once

#include <cstdint>

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
OPTIM_EXT_HOST_DEVICE constexpr int slot_in(unsigned used, int operand) {
  return __builtin_popcount(used & ((1u << operand) - 1u));
}
OPTIM_EXT_HOST_DEVICE constexpr int nth_operand(unsigned used, int slot) {
  int operand = 0;
  while (!((used >> operand) & 1u) || slot_in(used, operand) != slot) ++operand;
  return operand;
}
template <class Rule>
constexpr int kSlots = __builtin_popcount(Rule::kUsed);
template <class Rule>
OPTIM_EXT_HOST_DEVICE constexpr int slot_of(int operand) {
  return slot_in(Rule::kUsed, operand);
}
template <class Rule>
OPTIM_EXT_HOST_DEVICE constexpr int operand_of(int slot) {
  return nth_operand(Rule::kUsed, slot);
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

// What is said of one tensor whatever the rule.
struct EntryHead {
  int64_t numel;
  double step;              // where the host knows it
  const void* device_step;  // else where it lives (f32 or f64), less `step`; null on the host
  void* average;            // the running average of the updated parameter; null: none
  int32_t layout;           // where its Layout lies, in bytes from the start of the table; 0: dense, all in one order
  int32_t average_layout;   // the same for the average and the parameter
  Storage storage[kMaxOperands];  // by slot
  Storage step_storage, average_storage;
  bool vector, average_vector;  // dense, of one storage, aligned: 16 bytes at a time
};

// One tensor with its state.
template <class Rule>
struct Entry : EntryHead, ScalarStates<rules::kScalarsOf<Rule>> {
  void* data[kSlots<Rule>];
};

// Where parameters and state are kept in another way than a rule sees them, what lies beside them (Companions) follows
// each entry of the table: such entries are another type, so that those of other steps are no longer for it.
//
// They count *positions* in place of elements: where a row does not end with a block of q8, it is filled up to one with
// positions that no element has. A block then always begins at a multiple of kBlock8.
struct KeptHead {
  void* twin;
  const RoundingKey* key;  // null: nothing is rounded by chance
  int64_t row;             // elements of a row that does not end with a block; 0: positions are elements
  int32_t place;           // where Companions::place lies, in bytes from the start of the table; 0: it is the whole
  int32_t place_ndim;
  Precision precision;
  uint16_t in_order;   // bit k: the elements of operand k follow each other in memory as their indices do
  uint16_t by_chance;  // bit k: operand k is rounded by chance, if the key says so
  bool vector;         // all of them do, aligned for accesses of 8 elements, and positions come in eights
  bool counts_later;   // as in Companions
};

template <class Rule>
struct KeptEntry : Entry<Rule> {
  KeptHead kept;
  uint8_t* exponents[kSlots<Rule>];
};

// What is said of a launch whatever the rule.
struct BatchHead {
  LiveHyper hypers[kMaxLiveHypers];
  int32_t hyper_count;
  int32_t count;  // entries in the table
  int64_t chunk;  // elements per block, a multiple of kMinChunk
  DeviceControls controls;
  double average_weight;        // of the updated parameter in its average, unless controls say where that lives
  bool averaged;                // some entries have an average
  bool kept;                    // entries say what lies beside their tensors
  const unsigned char* remote;  // the table in device memory; null: it follows in the arguments
};

template <class Rule>
struct Batch : BatchHead {
  Rule rule;
};

// Kernel arguments of one size, table included.
template <class Rule, int64_t kBytes>
struct alignas(8) Args {
  static constexpr int64_t kRoom = kBytes - static_cast<int64_t>(sizeof(Batch<Rule>));
  Batch<Rule> batch;
  unsigned char room[kRoom];
};

// What the host has to know of a rule to pack its arguments: entries are a head, the scalars and the data of each slot;
// arguments a head, the rule and the table.
struct RuleShape {
  int64_t bytes;  // of the rule, in whole doubles
  unsigned used;
  int scalars;
  bool kept = false;  // entries are KeptEntry

  OPTIM_EXT_HOST_DEVICE constexpr int slots() const { return __builtin_popcount(used); }
  OPTIM_EXT_HOST_DEVICE constexpr int64_t entry_bytes() const {
    const unsigned pointers = static_cast<unsigned>(slots()) * (kept ? 2 : 1);
    return static_cast<int64_t>(sizeof(EntryHead) + sizeof(ScalarState) * static_cast<unsigned>(scalars) +
                                sizeof(void*) * pointers + (kept ? sizeof(KeptHead) : 0));
  }
};

template <class Rule>
OPTIM_EXT_HOST_DEVICE constexpr RuleShape shape_of() {
  constexpr RuleShape shape{(sizeof(Rule) + 7) / 8 * 8, Rule::kUsed, rules::kScalarsOf<Rule>};
  constexpr RuleShape kept{shape.bytes, shape.used, shape.scalars, true};
  static_assert(alignof(Rule) <= 8 && sizeof(Entry<Rule>) == shape.entry_bytes() &&
                sizeof(KeptEntry<Rule>) == kept.entry_bytes() &&
                sizeof(Batch<Rule>) == sizeof(BatchHead) + shape.bytes);
  return shape;
}

// The compilers of host and device lay these out alike.
static_assert(sizeof(EntryHead) == 56 && sizeof(ScalarState) == 24 && sizeof(LiveHyper) == 24 &&
              sizeof(DeviceControls) == 40 && sizeof(BatchHead) == 176 && sizeof(Layout) == 1096 &&
              sizeof(KeptHead) == 40);

// Where the entries of a table begin: after the first chunk of each (int32, compact because it is searched).
OPTIM_EXT_HOST_DEVICE int64_t entries_at(int64_t count) { return (count * 4 + 7) / 8 * 8; }

}  // namespace optim_ext::cuda
