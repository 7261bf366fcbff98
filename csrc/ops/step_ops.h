// The ops that step, without their types: what the host path and the tests know of them.
#pragma once

#include <ATen/core/function_schema.h>

#include <vector>

#include "../rules/table.h"
#include "../call/call.h"
#include "ops.h"

namespace optim_ext::ops {

enum class HyperKind : uint8_t { number, tensor, flag, whole };  // as rules::Field::Kind

// A hyper-parameter: the op's argument, and what the options of an optimizer call it.
struct HyperInfo {
  const char* name;
  HyperKind kind;
  const char* key;
  int index;  // in the tuple under this key; -1: the option itself
};

// The value of one.
struct HyperValue {
  double number = 0.0;
  int64_t whole = 0;
  bool flag = false;
  Tensor tensor;

  template <class T>
  T as() const {
    if constexpr (std::is_same_v<T, double>) {
      return number;
    } else if constexpr (std::is_same_v<T, int64_t>) {
      return whole;
    } else if constexpr (std::is_same_v<T, bool>) {
      return flag;
    } else {
      return tensor;
    }
  }
};

class StepOp {
 public:
  StepOp(const StepOp&) = delete;
  virtual ~StepOp() = default;

  // Calls the op through the dispatcher with a typed handle, so that profilers, modes and autograd see the call and
  // nothing is boxed; or only its checks, which go straight to the function.
  virtual void run(const std::vector<TensorList>& lists, const HyperValue* hypers, const StepControls& controls,
                   bool check_only) const = 0;

  const char* const name;
  const std::vector<rules::List> lists;
  const std::vector<HyperInfo> hypers;
  const bool is_element_wise;   // each element is stepped on its own, so gradients may have some rows only
  const bool takes_companions;  // parameters and state may be kept in other ways than the rule sees them

  // Every op of this library that steps, by name.
  static std::vector<const StepOp*> all();
  // One of these, or of those that were defined since. Throws std::out_of_range.
  static const StepOp& named(const std::string& name);

 protected:
  StepOp(const char* name, std::vector<rules::List> lists, std::vector<HyperInfo> hypers, bool is_element_wise,
         bool takes_companions);
  // One that is not of this library, but steps element by element by an op of it.
  struct Unlisted {};
  StepOp(Unlisted, const char* name, std::vector<rules::List> lists, std::vector<HyperInfo> hypers);
  c10::FunctionSchema schema() const;
};

// The schema of an op that steps, from what is its own: "name(lists, *, hyper-parameters".
c10::FunctionSchema step_schema(const std::string& own);

// What at_step cannot make of hyper-parameters.
class DerivedProblem {
 public:
  DerivedProblem(const char* op, const char* name, double value, double step, bool is_strict)
      : op_(op), name_(name), value_(value), step_(step), is_strict_(is_strict) {}
  void add(const char* key, int index, double value);
  void refuse() const;  // unless the first one is infinite, in which case it is what was asked for

 private:
  const char *op_, *name_;
  double value_, step_;
  const bool is_strict_;
  std::string from_;
  bool is_asked_for_ = false, has_zero_ = false;
};

}  // namespace optim_ext::ops
