// How an op and a caller on the host who makes the same call step after step spare each other work.
#pragma once

#include <optional>

#include "spec.h"
#include "work.h"

namespace optim_ext::ops {

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

}  // namespace optim_ext::ops
