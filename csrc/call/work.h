// Checked memory, and rules as they stand at a step: what drivers work on.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "../kernels/operand.h"
#include "../kernels/program.h"
#include "../rules/rule.h"

namespace optim_ext::ops {

// A hyper-parameter that lives on the device: where its double lies in the rule, and where the value is.
struct DeviceHyper {
  int64_t offset;
  const void* value;
  Storage storage;
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
  bool draws_on_device = false;  // random words, which are counted there
  bool at_one_point = false;     // known of all bundles; see same_point()

  // For another rule over the same memory: gradients are unscaled by now, and steps and draws are counted on the
  // device, too.
  void begin_second_rule();

  // Gives every parameter's rule a number that was computed for it, in place of scalar state: those at `values`, which
  // are on the device.
  void use_scalars(int k, const double* values);
};

// One operand of a bundle, as a reduction takes it. `layout` holds its strides, if it has any, for as long as it is
// used.
Bundle one_operand(const Bundle& from, int operand, Layout& layout);

// The same of a whole call.
class OneOperand : public Work {
 public:
  OneOperand(const Work& call, int operand);

 private:
  std::deque<Layout> layouts_;
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

}  // namespace optim_ext::ops
