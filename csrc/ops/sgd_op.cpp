#include "../rules/sgd.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct SgdRow : StepRow<rules::Sgd<false>> {
  template <class Use>
  static void choose(const Options& options, const Use& use) {
    options.momentum != 0.0 ? use(rules::Sgd<true>{}) : use(rules::Sgd<false>{});
  }
};

const RegisteredStepOp<"sgd_", SgdRow> sgd;

}  // namespace

}  // namespace optim_ext::ops
