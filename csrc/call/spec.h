// What a call is asked to do, and how it says that it cannot.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>

#include "../kernels/operand.h"
#include "controls.h"

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

// State that only some parameters have: the tensor of each parameter, undefined for those without. `reduced` is the
// dimension, from the last one, in which it has one element where its parameter has many; 0: none.
struct PartialList {
  List list;
  int64_t reduced;
};

// Names of the kinds of companions: those of all parameters of one kind follow each other in the list.
constexpr const char* kCompanions[] = {"companions[0]", "companions[1]", "companions[2]", "companions[3]",
                                       "companions[4]", "companions[5]", "companions[6]", "companions[7]",
                                       "companions[8]", "companions[9]", "companions[10]"};
static_assert(std::size(kCompanions) == 3 + kMaxOperands - 2, "as many as Call::add_companions tells apart");

constexpr unsigned kAllKept = ~0u;  // operands

struct CallSpec {
  const char* op;  // its name, for messages
  const StepControls& controls;
  std::initializer_list<List> operands;  // params, grads, then the state, in the rule's order
  std::optional<at::TensorList> state_steps = std::nullopt;
  std::initializer_list<List> scalars = {};  // numbers of state besides the step count, in the rule's order
  bool takes_sparse = false;                 // gradients may be sparse: the rule is applied to the rows they hold
  bool counts = true;  // false: the step, and what it draws, is counted by another call of the same op, after this one
  std::initializer_list<PartialList> partial = {};  // only checked
  bool any_order = false;         // nothing is summed over elements, so that these may come in any order
  bool takes_companions = false;  // every sweep and reduction of the op reads parameters and state through them
  bool companions_on_gpu = true;  // so do its kernels on a GPU: those of rules in Python that take norms do not
  // The operands that companions belong to, a bit each. An op of several sweeps hands all it is given to each of them;
  // a sweep passes over what lies beside operands that it does not have.
  unsigned kept = kAllKept;
  int leader = 0;  // the operand whose shape the others must have and whose memory order is walked
};

// Throws unless `weight`, of the newest in a running average, is a number in [0, 1].
void check_average_weight(const char* op, const char* name, double weight);
// Whether this is a count of steps: neither negative, nor infinite, nor NaN.
inline bool is_count(double value) { return value >= 0.0 && !std::isinf(value); }

}  // namespace optim_ext::ops
