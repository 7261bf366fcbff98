// What a sweep works on: raw pointers with a storage type, and how an element index maps to memory. No torch in sight.
#pragma once

#include <cstdint>

#include "../storage/block8.h"

namespace optim_ext {

constexpr int kMaxOperands = 10;  // tensors one parameter may bring to a rule
constexpr int kMaxScalars = 2;    // numbers of state one parameter may bring besides its step count
constexpr int kGradOperand = 1;   // every rule's second operand
constexpr int kMaxDims = 12;      // dimensions of a layout, after merging those that can be walked as one

// Strides of operands that do not share one dense order. Index i counts elements in the parameter's own memory order:
// dimension 0 is the outermost, dimension ndim - 1 the fastest.
//
// A sparse gradient has some rows only: dimension 0 counts these, and `rows` says which row of the other operands each
// of them is. On the CPU a row of it may be the sum of several in memory, added up in order where it is read: row n is
// those numbered sources[firsts[n]] to sources[firsts[n + 1] - 1].
//
// Where there are more dimensions than a layout holds, dimension 0 stands for the outermost ones: `outer` says where in
// each operand its index lies.
struct Layout {
  const int64_t* rows;    // null: dense
  const int64_t* firsts;  // null: row n of the gradient is its row n in memory
  const int64_t* sources;
  const int64_t* outer;  // null, or sizes[0] places for each of kMaxOperands operands
  int32_t ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxOperands][kMaxDims];

  // Where element `index` of `operand` lies, in elements from its data pointer.
  OPTIM_EXT_HOST_DEVICE int64_t offset(int operand, int64_t index) const {
    int64_t at = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t rest = index / sizes[d];
      at += place(operand, d, index - rest * sizes[d]) * strides[operand][d];
      index = rest;
    }
    return at;
  }

  // The place of element `index` in each dimension, which is the same for all operands.
  OPTIM_EXT_HOST_DEVICE void find(int64_t index, int64_t* places) const {
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t rest = index / sizes[d];
      places[d] = index - rest * sizes[d];
      index = rest;
    }
  }

  // Where the element at these places lies in `operand`, in elements from its data pointer.
  OPTIM_EXT_HOST_DEVICE int64_t offset_at(int operand, const int64_t* places) const {
    int64_t at = 0;
    for (int d = 0; d < ndim; ++d) at += place(operand, d, places[d]) * strides[operand][d];
    return at;
  }

  // Moves on by `runs` runs of the fastest dimension, which lie in one index of the dimensions before the last two.
  // `at` is where the first of them begins; returns where the run after them does.
  OPTIM_EXT_HOST_DEVICE int64_t skip_runs(int operand, int64_t at, int64_t* places, int64_t runs) const {
    for (int d = ndim - 2; d >= 0; --d) {
      at -= place(operand, d, places[d]) * strides[operand][d];
      places[d] = places[d] + runs < sizes[d] ? places[d] + runs : 0;
      at += place(operand, d, places[d]) * strides[operand][d];
      if (places[d] != 0) break;
      runs = 1;
    }
    return at;
  }

  // Whether an operand is dense, in the order the others are walked in.
  OPTIM_EXT_HOST_DEVICE bool is_dense(int operand) const {
    bool dense = rows == nullptr && outer == nullptr;
    int64_t stride = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      dense = dense && (sizes[d] == 1 || strides[operand][d] == stride);
      stride *= sizes[d];
    }
    return dense;
  }

  // Lets an operand that is not part of the call be dense, in the order the others are walked in.
  void make_dense(int operand) {
    int64_t stride = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      strides[operand][d] = d == 0 && outer != nullptr ? 1 : stride;  // whose places are those of dense memory already
      stride *= sizes[d];
    }
  }

  // Where index `i` of dimension `d` is to be found in `operand`.
  OPTIM_EXT_HOST_DEVICE int64_t place(int operand, int d, int64_t i) const {
    if (d != 0) return i;
    if (outer != nullptr) return outer[operand * sizes[0] + i];
    return rows != nullptr && operand != kGradOperand ? rows[i] : i;
  }
};

// One number of a parameter's state, such as a running product. Like a step count it lives on the host or on the
// device.
struct ScalarState {
  double value;  // before this step, where the host knows it
  void* device;  // else where it lives; null on the host
  Storage storage;
};

// How a parameter of 16 bits is kept more exactly than it says itself (storage/).
enum class Precision : uint8_t { native, master, remainder, kahan };

// What a parameter's state keeps of its random words: the key of all of them, how many steps have drawn some, and which
// operands they round (bit k: operand k, bit k + 16: operand k has no sign).
struct RoundingKey {
  int64_t key, draws, by_chance;

  OPTIM_EXT_HOST_DEVICE unsigned rounded() const { return static_cast<unsigned>(by_chance & 0xffff); }
  OPTIM_EXT_HOST_DEVICE unsigned positive() const { return static_cast<unsigned>(by_chance >> 16 & 0xffff); }
};

// What lies beside a parameter and its state where memory holds something else than the numbers a rule sees.
struct Companions {
  Precision precision;
  void* twin;             // an element for each of the parameter's, in its memory order; null where it is native
  RoundingKey* live_key;  // where the key lives on the device, which then says what the three below say, but for what
                          // is said of it here; null on the host
  bool counts_later;      // the count there is one behind: a later sweep of the same step draws, too, and counts it
  uint64_t key;           // of the random words at this step (storage/stochastic.h)
  unsigned by_chance;     // bit k: operand k is rounded so; with a live_key: no operand without its bit is
  uint8_t* exponents[kMaxOperands];  // of the blocks of operands in q8; null of others
  int64_t row;                       // elements of an index of the first dimension, which blocks lie in; 0: no blocks
  int64_t blocks_of_row;
  unsigned positive;  // bit k: operand k has no sign
  // Where a part of a tensor is in the whole, which random words go by: the index of its first element there, then for
  // each of `place_ndim` dimensions of the part, from the outermost in, its size and how far apart neighbours are in
  // the whole. Null: it is the whole.
  const int64_t* place;
  int place_ndim;

  // Where the block that element `index` lies in begins or, if that is before it, the next one: pieces end there.
  OPTIM_EXT_HOST_DEVICE int64_t end_of_piece(int64_t index) const {
    if (row == 0) return index;
    const int64_t in_row = index % row, rounded = (in_row + kBlock8 - 1) / kBlock8 * kBlock8;
    return index - in_row + (rounded < row ? rounded : row);
  }
};

// One parameter with everything its rule reads and writes. Operands follow the rule's order; absent ones are null.
// Complex tensors appear as twice as many real elements.
struct Bundle {
  void* data[kMaxOperands];
  Storage storage[kMaxOperands];
  int64_t numel;
  const Layout* layout;     // null: every operand is dense and in the same order, so element i is data[i]
  double step;              // step count after this step's increment, where the host knows it
  const void* device_step;  // else where it lives on the device (f32 or f64, see step_storage), less `step`; or null
  Storage step_storage;
  ScalarState scalars[kMaxScalars];
  bool in_double;         // the rule computes in double: one of the operands is stored as f64
  const Bundle* average;  // the operands of rules::Average for the updated parameter, walked in the same order; or null
  const Companions* companions;  // where there are any; no operand is stored as f64 then; or null
};

// Whether one loop on the CPU can update a parameter and its average: no element needs converting or looking for.
OPTIM_EXT_HOST_DEVICE bool averages_in_loop(const Bundle& bundle) {
  const Bundle& average = *bundle.average;
  const Storage native = bundle.in_double ? Storage::f64 : Storage::f32;
  bool fits = bundle.layout == nullptr && average.layout == nullptr && average.storage[0] == native;
  for (int k = 0; k < kMaxOperands; ++k) fits &= bundle.data[k] == nullptr || bundle.storage[k] == native;
  return fits;
}

// Those values of a Pass that live on the device, where kernels read them.
struct DeviceControls {
  const float* grad_scale = nullptr;     // null: gradients are taken as they are
  const float* found_inf = nullptr;      // 1: skip the whole step; null: never
  const void* grad_factor = nullptr;     // null: one
  const void* average_weight = nullptr;  // null: the host knows it
  Storage grad_factor_storage = Storage::f32, average_weight_storage = Storage::f32;
};

// What happens to the gradients on the way into a rule, and to its averages after it. On the CPU the values are read on
// the host; on a GPU they stay where they are.
struct Pass {
  double grad_scale = 1.0;      // gradients are divided by it and written back, as torch's fused path does
  bool unscale = false;         // whether grad_scale is there at all
  double grad_factor = 1.0;     // multiplies what the rule sees; the gradients stay as they are
  double average_weight = 1.0;  // of the updated parameter in its average, where a bundle has one
  DeviceControls on_device;     // take the place of these
};

}  // namespace optim_ext
