// One call of an op, from the lists torch hands over to the bundles a driver sweeps. Every check of this library is
// made here, before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <list>
#include <string>
#include <vector>

#include "../memory/rows.h"
#include "../memory/turns.h"
#include "../rules/average.h"
#include "handover.h"
#include "known_calls.h"
#include "spec.h"
#include "tensors.h"
#include "work.h"

namespace optim_ext::ops {

// Where the value of a one-element tensor lies, null if it was not given. Throws ValueError for another dtype or
// device.
const void* scalar_data(const char* op, const char* name, const std::optional<at::Tensor>& value, at::Device device,
                        at::ArrayRef<at::ScalarType> dtypes);

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
  // What is left of this where scalar state depends on what was measured after commit().
  void store_scalars(const RuleProgram& program, const void* rule);

  // For a sweep that only measures: gradients are taken as they will be once they are unscaled, steps as they will be
  // once they are counted, and both stay as they are. `factor`: what scale and factor of the gradients come to, a
  // double on the device, where that is no CPU and there is a scale.
  void keep_all(const at::Tensor& factor);

  const char* op() const { return spec_.op; }

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
    bool may_be_q8(int k) const { return k > kGradOperand && is_used(k); }
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
  const at::Tensor& companion(size_t kind, int64_t i) const;
  size_t companion_kinds() const;
  void add_companions(int64_t i);
  void add_companion(size_t kind, int64_t i, Companions& made);
  bool follows_key(size_t kind, int64_t i) const;
  void add_place(size_t kind, int64_t i, Companions& made);
  void add_exponents(size_t kind, int64_t i, Companions& made);
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
  std::vector<Companions> companions_;  // of all bundles, or none
  std::array<KnownCalls::Known, KnownCalls::kMost> known_;
  const KnownCall* expected_ = nullptr;  // one of those
  mutable std::atomic<bool> grads_meet_writes_ = false;
  std::list<Layout> layouts_;
  std::list<memory::SparseRows> rows_;  // what these say of sparse gradients
  std::list<at::Tensor> held_;          // what bundles point to besides the tensors of the lists
  bool host_scalars_ = false;
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
