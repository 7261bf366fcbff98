// Norms of tensors of which several processes have a part each.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <unordered_map>
#include <vector>

#include "../call/call.h"

namespace optim_ext::ops {

// Which parameters are parts of a whole: where the sums of each lie among those of all, and how many real numbers the
// whole has.
struct WholeOf {
  int64_t row;
  double numel;
};
using WholesByPart = std::unordered_map<const c10::TensorImpl*, WholeOf>;

// While one of these lives, the ops of this thread that take norms of whole tensors are called twice. While it gathers
// they check their input, measure what this process has, and write nothing. Once it knows what all processes have
// measured, the same calls in the same order step by that. So no process has written anything before the others are
// known to step, and what they wait for does not depend on which calls are made here.
class WholeNorms {
 public:
  explicit WholeNorms(const WholesByPart& wholes);
  ~WholeNorms();
  WholeNorms(const WholeNorms&) = delete;
  static WholeNorms* current();

  bool gathers() const { return gathers_; }

  // Norms of the parameters of one call, shape (kMaxScalars, parameters), as this process has measured them.
  void add(at::TensorList params, const at::Tensor& norms);
  // Their squares by row, zeros where nothing was measured: float64 of shape (rows, kMaxScalars).
  at::Tensor sums(int64_t rows) const;
  // What these are for all processes together. From now on there is nothing to gather.
  void know(const at::Tensor& totals);
  // The norms of the next call's parameters: those that are parts of a whole have that of the whole.
  at::Tensor next();

  // Of a parameter, or the whole that it is a part of.
  double numel_of(const at::Tensor& param, double own) const;

 private:
  struct OfCall {
    at::Tensor norms;
    std::vector<int64_t> rows;  // by parameter, -1 where it is no part
  };
  // Calls visit(norms, totals) with what is neighbouring in both: shape (kMaxScalars, n) and (n, kMaxScalars).
  template <class Visit>
  static void over_runs(const OfCall& call, const at::Tensor& totals, const Visit& visit);

  const WholesByPart& wholes_;
  std::vector<OfCall> calls_;
  size_t taken_ = 0;
  bool gathers_ = true;
  WholeNorms* const before_;
};

// Doubles of shape (kMaxScalars, parameters) on the device of the call.
at::Tensor room_for_norms(const Call& call);

// Lets a call measure what it would step by, and write nothing.
void keep_all(Call& call, const StepControls& controls);

// The norms that an op with norms steps by, in such room; the call is committed then. measure(norms) takes those of
// what is here. Nothing where the call ends before it writes, as it was to check its input, or to measure.
template <class Measure>
std::optional<at::Tensor> norms_for_step(Call& call, at::TensorList params, const StepControls& controls,
                                         const Measure& measure) {
  WholeNorms* const wholes = WholeNorms::current();
  const bool gathers = wholes != nullptr && wholes->gathers();
  if (CheckOnly::active() && !gathers) return std::nullopt;
  if (wholes != nullptr && !gathers) {
    call.commit();
    return wholes->next();
  }
  at::Tensor norms = room_for_norms(call);
  if (gathers) {
    keep_all(call, controls);
  } else {
    call.commit();
  }
  measure(norms);
  if (!gathers) return norms;
  wholes->add(params, norms);
  return std::nullopt;
}

}  // namespace optim_ext::ops
