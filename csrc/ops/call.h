// One call of an op, from the lists torch hands over to the bundles a driver sweeps. Every check of this library is
// made here, before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/operand.h"

namespace optim_ext::ops {

// A tensor, or a list, that an op cannot take. `index` is its place in the lists, -1 where the lists as such are wrong.
class BadInput : public c10::Error {
 public:
  BadInput(const std::string& op, const std::string& list, int64_t index, const std::string& problem);
  const std::string list, problem;
  const int64_t index;
};

// One operand of a rule for all parameters: the list and the name the schema gives it.
struct List {
  const char* name;
  at::TensorList tensors;
};

// One hyper-parameter: where the rule keeps it, and the number or one-element tensor the caller gave.
struct Hyper {
  Hyper(const char* name, double& slot, double value) : name(name), slot(&slot), value(value) {}
  Hyper(const char* name, double& slot, const at::Tensor& value) : name(name), slot(&slot), tensor(&value) {}
  const char* name;
  double* slot;
  double value = 0.0;
  const at::Tensor* tensor = nullptr;
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
};

struct CallSpec {
  const Common& common;
  std::initializer_list<List> operands;  // params, grads, then the state, in the rule's order
  std::optional<at::TensorList> state_steps = std::nullopt;
};

// What a driver is handed: checked memory.
struct Work {
  at::Device device = at::kCPU;
  std::vector<Bundle> bundles;
  std::vector<uint8_t> in_double;  // per bundle: compute in double
  std::vector<DeviceHyper> device_hypers;
  Pass pass;
  bool steps_on_device = false;
};

class Call : public Work {
 public:
  // Checks everything; throws BadInput (a Python RuntimeError) or c10::ValueError (a Python ValueError).
  Call(const CallSpec& spec, int operands, unsigned used, unsigned updates);

  // Puts each hyper-parameter where the rule wants it, or notes that it has to be read on the device.
  void set(std::initializer_list<Hyper> hypers, const void* rule, size_t rule_size);

  bool empty() const { return bundles.empty(); }
  // Advances counters that live on the host and tells autograd that parameters and state are about to change.
  void commit();

  bool skip = false;  // found_inf, where the host can see it

 private:
  void check_lengths() const;
  void add_bundle(int64_t i);
  void add_layout(int64_t i, Bundle& bundle);
  void add_step(int64_t i, Bundle& bundle);
  void check_overlap() const;
  void read_pass();
  [[noreturn]] void refuse(const char* list, int64_t index, const std::string& problem) const;

  const CallSpec& spec_;
  const int operands_;
  const unsigned used_, updates_;
  std::deque<Layout> layouts_;
};

std::optional<Storage> storage_of(at::ScalarType dtype);

// Tells autograd that a tensor has been written.
void note_write(const at::Tensor& tensor);

// While one of these lives, ops of this thread check their input and return before the first write.
class CheckOnly {
 public:
  CheckOnly();
  ~CheckOnly();
  static bool active();
};

// The body of every element-wise op: check, fill in the rule, hand over to the driver of the device at hand.
template <class Driver, class Rule>
void run(Rule& rule, const CallSpec& spec, std::initializer_list<Hyper> hypers) {
  Call call(spec, Rule::kOperands, Rule::kUsed, Rule::kUpdates);
  call.set(hypers, &rule, sizeof(Rule));
  if (CheckOnly::active() || call.empty() || call.skip) return;
  call.commit();
  Driver::run(rule, call);
}

}  // namespace optim_ext::ops
