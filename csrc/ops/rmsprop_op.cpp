#include "../rules/rmsprop.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct RMSpropRow : StepRow<rules::RMSprop<false, false>> {
  template <class Use>
  static void choose(const Options& options, const Use& use) {
    if (options.centered) {
      options.momentum > 0.0 ? use(rules::RMSprop<true, true>{}) : use(rules::RMSprop<true, false>{});
    } else {
      options.momentum > 0.0 ? use(rules::RMSprop<false, true>{}) : use(rules::RMSprop<false, false>{});
    }
  }
};

const RegisteredStepOp<"rmsprop_", RMSpropRow> rmsprop;

}  // namespace

}  // namespace optim_ext::ops
