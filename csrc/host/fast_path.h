// What a plan remembers of small steps on the CPU, by value: a step that finds all tensors as they were looks at each
// of them once, hands its ops the bundles of the step before, and writes when all of these were found sound.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "../call/call.h"
#include "../ops/step_ops.h"
#include "planned_call.h"
#include "python_tensors.h"
#include "state_items.h"

namespace optim_ext::ops {

// Where the memory that a step writes was allocated: a filter that stays in the first-level cache, then a table.
class WrittenMemory {
 public:
  explicit WrittenMemory(const std::vector<const void*>& allocations);
  bool contains(const void* address) const {
    return ((filter_[bit_of(address) / 64] >> (bit_of(address) % 64)) & 1) != 0 && all_.contains(address);
  }

 private:
  size_t bit_of(const void* address) const {
    return ((reinterpret_cast<uintptr_t>(address) >> 4) * 0x9e3779b97f4a7c15u >> 20) & (64 * filter_.size() - 1);
  }
  Addresses all_;
  std::vector<uint64_t> filter_;
};

// The tensors of one call.
class LocalView {
 public:
  // Notes what look() will compare. False for a call that has to be looked at closely every time. lists: the op's, of
  // which the gradients are not remembered; entries: of the state, by parameter.
  bool remember(const StepOp& op, const std::vector<PythonTensors>& lists, Prepared found,
                const std::unordered_map<PyObject*, size_t>& entries);

  size_t size() const { return prepared_.bundles.size(); }
  int64_t elements() const { return elements_; }
  Prepared& prepared() { return prepared_; }

  // Adds the memory that the call writes: where it was allocated, and from where to where it is written.
  void add_written(std::vector<const void*>& allocations, std::vector<memory::Access>& writes, int32_t member) const;

  // Whether the tensors [begin, end) are what they were, with gradients of the same kind, outside of `written`; the
  // bundles then say where these are. One thread has the GIL and has found parameters and entries alive.
  bool look(size_t begin, size_t end, const StateItems& state, const WrittenMemory& written);
  // After look(): what holds for all tensors of the call.
  void finish_look();
  // The first tensor of each list, for what an op asks of its lists.
  std::vector<at::TensorList> firsts(size_t lists) const;

  // Tells autograd of the writes to come, and counts the step: tensor by tensor, as one count may serve several.
  void note_writes();

 private:
  static constexpr int kSteps = -1;  // in the place of an operand
  static constexpr size_t kNoEntry = ~size_t{0};

  // What the tensors of a list have in common.
  struct Kind {
    c10::DispatchKeySet keys;  // they say layout, kind of device, lazy views, inference
    caffe2::TypeMeta dtype;
    c10::DeleterFnPtr deleter;  // not that of memory which is copied before it is written
    PyTypeObject* type;
    Storage storage;
    int64_t width;  // numbers in an element
    bool operator==(const Kind&) const = default;
  };
  struct Column {
    size_t list;
    int operand;
    bool is_written;
    Kind kind;
  };
  // Of one tensor, all that its operand in a bundle depends on besides its kind and shape.
  struct Seen {
    PyObject* object;
    const c10::TensorImpl* tensor;
    const c10::StorageImpl* storage;
    const void* data;  // of the storage
    int64_t offset;    // in bytes
    const void* begin() const { return static_cast<const char*>(data) + offset; }
  };

  static Kind kind_of(const at::Tensor& tensor, PyObject* object);
  static std::optional<Seen> see(const Kind& kind, const at::Tensor& tensor, PyObject* object);
  const c10::TensorImpl* param_at(size_t i) const;
  void fetch(size_t i, size_t end, const StateItems& state) const;
  bool is_unchanged(size_t i) const;
  bool take_grad(size_t i, const WrittenMemory& written);
  double count_at(size_t i) const;

  std::vector<Column> columns_;  // the lists that have tensors, besides the gradients; parameters first
  std::vector<Seen> seen_;       // tensor by tensor, column by column
  std::vector<size_t> entries_;  // of the state
  std::vector<int64_t> numels_;
  int64_t elements_ = 0;
  size_t steps_ = 0;  // the column of the step counts; 0: there is none
  Kind grad_kind_{};
  std::vector<double> counts_;  // as look() has found them
  Prepared prepared_;
};

class FastPath {
 public:
  // Elements of all parameters. The step keeps the GIL, which keeps the tensors alive without counting their owners, so
  // it must not take longer than a thread may keep others waiting anyway (5 ms).
  static constexpr int64_t kMostElements = int64_t{1} << 21;

  bool is_known() const { return !views_.empty(); }
  void forget() { views_.clear(); }
  // Whether it is worth the while to remember the step at hand. What never stays the same is tried less and less often.
  bool should_remember();
  // The calls of a step that has just been taken. entries: see LocalView::remember().
  void remember(std::vector<LocalView> views);

  // Whether the step can be taken without another look at its tensors; forgets what does not hold any more. The caller
  // has the GIL and runs no Python code until step() is over.
  bool look(const StateItems& state);
  LocalView& view(size_t call) { return views_[call]; }
  // Takes the step.
  void step(const std::vector<Sweep>& sweeps);

 private:
  template <class Visit>
  void over_all(const Visit& visit);

  std::vector<LocalView> views_;  // by call
  std::vector<size_t> first_;     // tensor of each call, among those of all
  WrittenMemory written_{{}};
  int64_t wait_ = 0, next_wait_ = 1;  // steps until another one is remembered
  int64_t taken_ = 0;                 // steps by what is remembered
};

}  // namespace optim_ext::ops
