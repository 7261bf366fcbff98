// One call of an op, from the lists torch hands over to the bundles a driver sweeps. Every check of this library is
// made here, before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/operand.h"
#include "../kernels/program.h"
#include "../memory/rows.h"
#include "../memory/turns.h"
#include "../rules/average.h"
#include "../rules/rule.h"

namespace optim_ext::ops {

// A tensor, or a list, that an op cannot take. `index` is its place in the lists, -1 where the lists as such are wrong.
class BadInput : public c10::Error {
 public:
  BadInput(const std::string& op, const std::string& list, int64_t index, const std::string& problem);
  const std::string list, problem;
  const int64_t index;
};

// Hyper-parameters that an op cannot step with. `divides` where plain arithmetic on them divides by zero: torch's code,
// which does it in Python, then raises ZeroDivisionError.
class BadHyper : public c10::ValueError {
 public:
  BadHyper(const std::string& problem, bool divides);
  const bool divides;
};

// A hyper-parameter as the options of an optimizer name it: an option, or one entry of a tuple.
std::string hyper_name(const char* key, int index);

// One operand of a rule for all parameters: the list and the name the schema gives it.
struct List {
  const char* name;
  at::TensorList tensors;
};

// One hyper-parameter: its name, where the rule keeps it, and the number or one-element tensor the caller gave.
struct Hyper {
  Hyper(const char* key, double& slot, double value) : Hyper(key, -1, slot, value) {}
  Hyper(const char* key, double& slot, const at::Tensor& value) : Hyper(key, -1, slot, value) {}
  Hyper(const char* key, int index, double& slot, double value) : key(key), index(index), slot(&slot), value(value) {}
  Hyper(const char* key, int index, double& slot, const at::Tensor& value, bool in_scalars = true)
      : key(key), index(index), slot(&slot), tensor(&value), in_scalars(in_scalars) {}
  const char* key;
  int index;
  double* slot;
  double value = 0.0;
  const at::Tensor* tensor = nullptr;
  bool in_scalars = false;  // whether the rule's scalar state after a step depends on it
};

// A hyper-parameter that lives on the device: where its double lies in the rule, and where the value is.
struct DeviceHyper {
  int64_t offset;
  const void* value;
  Storage storage;
};

// What every op is given besides its own arguments.
struct Common {
  const char* op;                                // its name, for messages
  const std::optional<at::Tensor>& grad_scale;   // GradScaler's: gradients are divided by it, in place
  const std::optional<at::Tensor>& found_inf;    // one: nothing is written
  const std::optional<at::Tensor>& grad_factor;  // multiplies the gradients as the rule sees them, not in memory
  at::TensorList averages;                       // running averages of the parameters to be brought up to date; or none
  const std::optional<at::Tensor>& average_weight;  // of the updated parameter in its average
};

// Where the value of a one-element tensor lies, null if it was not given. Throws ValueError for another dtype or
// device.
const void* scalar_data(const char* op, const char* name, const std::optional<at::Tensor>& value, at::Device device,
                        at::ArrayRef<at::ScalarType> dtypes);

// State that only some parameters have: the tensor of each parameter, undefined for those without. `reduced` is the
// dimension, from the last one, in which it has one element where its parameter has many; 0: none.
struct PartialList {
  List list;
  int64_t reduced;
};

struct CallSpec {
  const Common& common;
  std::initializer_list<List> operands;  // params, grads, then the state, in the rule's order
  std::optional<at::TensorList> state_steps = std::nullopt;
  std::initializer_list<List> scalars = {};  // numbers of state besides the step count, in the rule's order
  bool takes_sparse = false;                 // gradients may be sparse: the rule is applied to the rows they hold
  bool counts = true;  // false: the step is counted by another call of the same op, after this one
  std::initializer_list<PartialList> partial = {};  // only checked
  bool any_order = false;  // nothing is summed over elements, so that these may come in any order
  int leader = 0;          // the operand whose shape the others must have and whose memory order is walked
};

// Bundles are written first by the threads that fill them in, in whose caches they were at the last step.
template <class T>
struct LeftToOthers : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = LeftToOthers<U>;
  };
  template <class U>
  void construct(U* at) noexcept {
    ::new (static_cast<void*>(at)) U;
  }
};
using Bundles = std::vector<Bundle, LeftToOthers<Bundle>>;

// What a driver is handed: checked memory.
struct Work {
  at::Device device = at::kCPU;
  Bundles bundles;
  std::vector<DeviceHyper> device_hypers;
  Pass pass;
  bool steps_on_device = false;
  bool at_one_point = false;  // known of all bundles; see same_point()

  // For another rule over the same memory: gradients are unscaled by now, and steps are counted on the device, too.
  void begin_second_rule();

  // Gives every parameter's rule a number that was computed for it, in place of scalar state: those at `values`, which
  // are on the device.
  void use_scalars(int k, const double* values);
};

// One operand of a call, as a reduction takes it.
class OneOperand : public Work {
 public:
  OneOperand(const Work& call, int operand);

 private:
  std::deque<Layout> layouts_;
};

// What a call writes and reads, found sound, by value: a later one like it need not be looked at again.
struct KnownCall;

// Some of these. Whoever makes the same calls again and again, step after step, keeps them.
class KnownCalls {
 public:
  static constexpr size_t kMost = 8;
  using Known = std::shared_ptr<const KnownCall>;
  std::array<Known, kMost> all() const;
  // In place of one of them that says the same of what is written, or of the oldest.
  void remember(Known call, const KnownCall* outdated);

 private:
  mutable std::mutex mutex_;  // two threads may step one optimizer
  std::array<Known, kMost> calls_;
  size_t oldest_ = 0;
};

// While one of these lives, calls of this thread are remembered there, and not with those that nobody keeps.
class RemembersCalls {
 public:
  explicit RemembersCalls(KnownCalls& calls);
  ~RemembersCalls();
  RemembersCalls(const RemembersCalls&) = delete;

 private:
  KnownCalls* const before_;
};

// One rule over the bundles of one call, with nothing left to check.
struct Sweep {
  Sweep(const RuleProgram& program, const void* rule, const Bundles& bundles, const Pass& pass)
      : program(&program), bundles(&bundles), pass(pass) {
    std::memcpy(this->rule, rule, program.bytes);
  }
  const RuleProgram* program;
  const Bundles* bundles;
  Pass pass;
  alignas(double) unsigned char rule[kMaxRuleBytes];
};

// What a call found its tensors to be, so that one which is known to find the same need not look at them.
struct Prepared {
  const char* op = nullptr;  // null: nothing was found that could be kept
  unsigned used = 0, updates = 0;
  Bundles bundles;
  bool at_one_point = false;  // whether all bundles are at the same step
  bool fits(const CallSpec& spec, unsigned used, unsigned updates) const;
};

// What goes between an op that applies one rule element by element and a caller on the host who makes the same call
// step after step. The op finds it through its thread, as its schema is about tensors.
//
// A call that is looking leaves in `prepared` what it found. One that is offered what an earlier call left checks its
// hyper-parameters and leaves the sweep to the caller, who has vouched for the tensors, and who writes (and counts, and
// tells autograd) when all of his calls were found sound.
class Handover {
 public:
  enum class Kind { look, offer };
  Handover(Kind kind, Prepared& prepared);
  ~Handover();
  Handover(const Handover&) = delete;
  static Handover* current();

  const Kind kind;
  Prepared& prepared;
  bool taken = false;          // what was offered
  std::optional<Sweep> sweep;  // none where the step is skipped

 private:
  Handover* const before_;
};

class Call : public Work {
 public:
  // Checks everything; throws BadInput (a Python RuntimeError) or c10::ValueError (a Python ValueError). `handover`:
  // that of the caller, if this is a call for one.
  Call(const CallSpec& spec, int operands, unsigned used, unsigned updates, Handover* handover = nullptr);

  // Puts each hyper-parameter where the rule wants it, or notes that it has to be read on the device.
  void set(std::initializer_list<Hyper> hypers, const void* rule, size_t rule_size);

  // Refuses complex parameters.
  void require_real() const;

  // Refuses parameters that are not real matrices.
  void require_real_matrices() const;

  bool empty() const { return bundles.empty(); }
  // Advances step counts that live on the host, and tells autograd that parameters and state are about to change.
  void commit();
  // The same, and advances scalar state on the host.
  void commit(const RuleProgram& program, const void* rule);

  const char* op() const { return spec_.common.op; }

  // Leaves what commit() and a driver would do to the caller, if he has offered to do it.
  bool leave(const RuleProgram& program, const void* rule);

  bool skip = false;  // found_inf, where the host can see it

 private:
  // Bundles that are lent by who prepared them, for as long as the call lives.
  class Loan {
   public:
    explicit Loan(Bundles& to) : to_(to) {}
    ~Loan() {
      if (from_) from_->swap(to_);
    }
    Loan(const Loan&) = delete;
    void take(Bundles& from) {
      from.swap(to_);
      from_ = &from;
    }
    explicit operator bool() const { return from_ != nullptr; }

   private:
    Bundles& to_;
    Bundles* from_ = nullptr;
  };

  // The lists behind the operands of one rule, with its masks.
  struct Operands {
    const List* lists;
    int count, leader;
    unsigned used, updates, written;  // written: updated, or unscaled in place
    bool is_used(int k) const { return (used >> k) & 1u; }
    bool is_updated(int k) const { return (updates >> k) & 1u; }
    bool is_written(int k) const { return (written >> k) & 1u; }
    bool reads_grads() const { return count > kGradOperand && is_used(kGradOperand) && !is_written(kGradOperand); }
  };

  // What the tensors of a list have in common as a rule, by its first one. One that has it too only needs the right
  // shape.
  struct Usual {
    c10::DispatchKeySet keys;  // they say layout, kind of device, lazy views, inference
    caffe2::TypeMeta dtype;
    Storage storage;
    int64_t width;              // numbers in an element: 2 where it is complex
    c10::DeleterFnPtr deleter;  // not that of memory which is copied before it is written
  };

  bool is_plain() const;
  void check_lengths() const;
  void make_bundles();
  bool find_usual(const Operands& operands, Usual* usual) const;
  void fetch(const Operands& operands, int64_t i) const;
  bool make_usual_bundle(const Operands& operands, const Usual* usual, int64_t i, Bundle& bundle) const;
  bool add_usual_step(const at::Tensor& tensor, const Usual& usual, Bundle& bundle) const;
  void make_bundle(const Operands& operands, int64_t i, Bundle& bundle);
  void check_writable(const char* list, int64_t i, const at::Tensor& tensor) const;
  const Layout* make_layout(const Operands& operands, int64_t i);
  at::Tensor sparse_gradient(int64_t i);
  void use_rows(int64_t i, const at::Tensor& grad, Bundle& bundle);
  void check_partial(const PartialList& partial) const;
  void add_step(int64_t i, Bundle& bundle);
  void add_scalar(int64_t i, const List& list, const Bundle& bundle, ScalarState& scalar);
  void note_writes() const;
  void advance(int64_t i);
  void store_scalar(int64_t i, int k, double value);
  void expect_writes();
  void note_grad(const void* memory) const;
  void check_overlap() const;
  template <class Visit>
  bool visit_written(const Visit& visit) const;
  template <class Memory>
  std::vector<memory::Access> reads_from(const Memory& written) const;
  KnownCalls::Known look_at_overlaps(KnownCall call) const;
  const char* name_of_list(int32_t list) const;
  [[noreturn]] void take_turns(const std::vector<int32_t>& turn_of_member) const;
  void read_pass();
  void read_average_weight();
  [[noreturn]] void refuse(const char* list, int64_t index, const std::string& problem) const;

  Handover* const handover_;
  Loan loan_{bundles};
  const CallSpec& spec_;
  const Operands rule_;
  const List averaging_lists_[2];
  const Operands averaging_;  // the operands of rules::Average
  Bundles averages_;
  std::array<KnownCalls::Known, KnownCalls::kMost> known_;
  const KnownCall* expected_ = nullptr;  // one of those
  mutable std::atomic<bool> grads_meet_writes_ = false;
  std::list<Layout> layouts_;
  std::list<memory::SparseRows> rows_;  // what these say of sparse gradients
  std::list<at::Tensor> held_;          // what bundles point to besides the tensors of the lists
  bool host_scalars_ = false;
};

// The rule as it stands at a parameter's step; `after`, if given, takes the scalar state after it.
template <class Rule>
Rule ready_for(const Rule& rule, const Bundle& bundle, rules::Scalar* after = nullptr) {
  if constexpr (rules::kScalarsOf<Rule> == 0) {
    return rule.at_step(bundle.step);
  } else {
    rules::Scalar scalars[kMaxScalars];
    for (int k = 0; k < Rule::kScalars; ++k) {
      scalars[k] = {bundle.scalars[k].value, bundle.scalars[k].storage == Storage::f64};
    }
    const Rule ready = rule.at_step(bundle.step, scalars);
    if (after) std::copy_n(scalars, Rule::kScalars, after);
    return ready;
  }
}

// The same for a rule without its type: written to `ready`, which has room for kMaxRuleBytes.
void make_ready(const RuleProgram& program, const void* rule, const Bundle& bundle, void* ready,
                rules::Scalar* after = nullptr);

// Whether two parameters are at the same step, so that a rule made ready for one serves the other.
inline bool same_point(int scalars, const Bundle& a, const Bundle& b) {
  bool same = a.step == b.step;
  for (int k = 0; k < scalars; ++k) {
    same &= a.scalars[k].value == b.scalars[k].value && a.scalars[k].storage == b.scalars[k].storage;
  }
  return same;
}

// Throws unless `weight`, of the newest in a running average, is a number in [0, 1].
void check_average_weight(const char* op, const char* name, double weight);
std::optional<Storage> storage_of(at::ScalarType dtype);

// Tells autograd that a tensor has been written.
void note_write(const at::Tensor& tensor);

// Whether this is a count of steps: neither negative, nor infinite, nor NaN.
inline bool is_count(double value) { return value >= 0.0 && !std::isinf(value); }

// A set of addresses that is asked much more often than it is made.
class Addresses {
 public:
  explicit Addresses(const std::vector<const void*>& addresses)
      : slots_(std::bit_ceil(2 * addresses.size() + 1), nullptr) {
    for (const void* const address : addresses) *place_of(address) = address;
  }
  bool contains(const void* address) const {
    return address != nullptr && *const_cast<Addresses*>(this)->place_of(address) == address;
  }

 private:
  const void** place_of(const void* address) {
    const size_t mask = slots_.size() - 1;
    size_t i = (reinterpret_cast<uintptr_t>(address) >> 4) * 0x9e3779b97f4a7c15u >> 20 & mask;
    while (slots_[i] != nullptr && slots_[i] != address) i = (i + 1) & mask;
    return &slots_[i];
  }
  std::vector<const void*> slots_;
};

// While one of these lives, ops of this thread check their input and return before the first write.
class CheckOnly {
 public:
  CheckOnly();
  ~CheckOnly();
  static bool active();
};

// One rule applied to one call: check, fill in the rule, hand over to the driver of the device at hand.
template <class Driver, class Rule>
void run(Rule& rule, const CallSpec& spec, std::initializer_list<Hyper> hypers) {
  Call call(spec, Rule::kOperands, Rule::kUsed, Rule::kUpdates);
  call.set(hypers, &rule, sizeof(Rule));
  if (CheckOnly::active() || call.empty() || call.skip) return;
  call.commit(program_of<Rule>(), &rule);
  Driver::run(rule, call);
}

}  // namespace optim_ext::ops
