#include "../rules/adam.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct AdamRow : StepRow<rules::Adam<false>> {
  template <class Use>
  static void choose(const Options& options, const Use& use) {
    options.amsgrad ? use(rules::Adam<true>{}) : use(rules::Adam<false>{});
  }
};

const RegisteredStepOp<"adam_", AdamRow> adam;
const RegisteredStepOp<"adamw_", AdamRow> adamw;

}  // namespace

}  // namespace optim_ext::ops
