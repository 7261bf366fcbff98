// Rules that are not known when this library is built, behind one op: rule_(params, grads, state0, ..., rule, hypers).
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/compiled_rule.h"
#include "../kernels/interpret.h"
#include "step_ops.h"

namespace optim_ext::ops {

constexpr int kOpenStates = kMaxOperands - 2;
constexpr int kOpenLists = kMaxOperands + kMaxScalars + 1;  // of the op: operands, scalars, step counts

// A hyper-parameter as the options of an optimizer name it; the first one of a rule says which way is up.
struct OpenHyper {
  std::string key;
  int index;  // in the tuple under this key; -1: the option itself
};

// Where a value of uniform code comes from: for messages.
struct OpenValue {
  std::string text;
  int line;
};

// Code, and where what it computes comes from.
struct OpenCode {
  RuleCode code;
  std::vector<OpenValue> values;  // of the fields, then of the scalars
};

// A number of each parameter that is measured before the rule is applied.
struct OpenNorm {
  int operand;
  bool is_mean;  // the root mean square, not the norm
};

// All that is compiled into a rule.
struct OpenParts {
  OpenCode rule;
  std::vector<OpenNorm> norms;
  // Makes, as operands after those of the rule, what norms are taken of and is no operand itself.
  std::optional<OpenCode> for_norms;
  std::vector<std::string> lists;  // the keys of the operands after the gradient, then those of the scalars
  std::vector<OpenHyper> hypers;

  // What is wrong with it; empty if nothing is.
  std::string problem() const;
};

// Its kernels on one GPU (rule_kernels_cuda.cpp).
struct OpenKernels;

// One rule with everything that was compiled into it. Lives for as long as the process: graphs and plans name it.
class OpenVariant {
 public:
  OpenVariant(std::string name, OpenParts parts);
  OpenVariant(const OpenVariant&) = delete;

  // What it is run by: any thread may set this while others step, as all programs of a variant give the same bits.
  const RulePrograms& programs() const { return *programs_.load(std::memory_order_acquire); }
  void use(const RulePrograms* programs) { programs_.store(programs, std::memory_order_release); }
  void interpret() { use(&interpreted_); }

  // What it is run by on a GPU; null: nothing. Kernels stay when others take their place.
  static constexpr int kMostGpus = 64;
  const OpenKernels* kernels_on(int gpu) const {
    return gpu < kMostGpus ? kernels_[static_cast<size_t>(gpu)].load(std::memory_order_acquire) : nullptr;
  }
  void use(int gpu, const OpenKernels* kernels) {
    kernels_.at(static_cast<size_t>(gpu)).store(kernels, std::memory_order_release);
  }

  const std::string name;  // what is in it, as a hash
  const OpenParts parts;
  const RuleCode& code;
  const std::vector<std::string>& lists;
  const std::vector<OpenHyper>& hypers;
  const bool counts;  // whether there are step counts

 private:
  const std::array<RuleProgram, 2> interpreted_programs_;
  const RulePrograms interpreted_;
  std::atomic<const RulePrograms*> programs_;
  std::array<std::atomic<const OpenKernels*>, kMostGpus> kernels_{};
};

// All variants of this process. Throws c10::ValueError where there is none of this name or number.
class OpenVariants {
 public:
  // Returns the number of the variant; the one that is there already where the name is known.
  static int64_t define(std::string name, OpenParts parts);
  static OpenVariant& numbered(int64_t number);
  // The same as another one, but run by a library compiled for it, which load_compiled_rule() finds at `path`.
  static int64_t define_compiled(std::string name, int64_t of, const std::string& path);
  static const OpenVariant& named(std::string_view name);
};

#if defined(OPTIM_EXT_WITH_CUDA)
// Loads what was compiled for a rule without norms and a GPU (optim_ext/_rules/cuda.py), which stays: one image of each
// kind of kernels (kernels/cuda/loaded_rule.h), empty where it was not compiled. Throws c10::Error where one cannot be
// loaded.
const OpenKernels* load_kernels(const OpenVariant& variant, int gpu, const std::vector<std::string>& images);

// Throws c10::ValueError where a call cannot be run by these kernels, which may be null.
void check_kernels(const OpenKernels* kernels, const OpenVariant& variant, const Work& call);
void run_kernels(const OpenKernels& kernels, const OpenRule& rule, const Work& call);
#endif

// Loads a library compiled for a rule and returns its programs, which stay. Throws c10::Error where it cannot be loaded
// or was made for another build of this one.
const RulePrograms* load_compiled_rule(const std::string& path, const OpenParts& parts);

// A class of optimizers whose rule is an open one, as the host path steps it: lists and hyper-parameters by the names
// its user gave them, the first of the hyper-parameters being the number of the variant, the second one `maximize`.
class OpenRuleOp final : public StepOp {
 public:
  OpenRuleOp(const char* name, std::vector<rules::List> lists, std::vector<HyperInfo> hypers)
      : StepOp(Unlisted{}, name, std::move(lists), std::move(hypers)) {}
  void run(const std::vector<TensorList>& lists, const HyperValue* hypers, const StepControls& controls,
           bool check_only) const override;

  // state: (key, role) of each list after the gradients, in order. hypers: (option, index in the tuple there or -1).
  // Returns the op, which stays, under a name no other has.
  static const OpenRuleOp& define(const std::string& class_name,
                                  const std::vector<std::pair<std::string, rules::List::Role>>& state,
                                  const std::vector<OpenHyper>& hypers);
};

}  // namespace optim_ext::ops
