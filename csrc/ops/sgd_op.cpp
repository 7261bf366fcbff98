#include "../rules/sgd.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

struct Row : StepRow<rules::Sgd<false>> {
  static constexpr bool kTakesSparse = true;
  static bool takes_sparse(const Options& options) { return options.momentum == 0.0; }
  template <class Use>
  static void choose(const Options& options, const Use& use) {
    options.momentum != 0.0 ? use(rules::Sgd<true>{}) : use(rules::Sgd<false>{});
  }
};

const RegisteredStepOp<"sgd_", Row> sgd;

}  // namespace

}  // namespace optim_ext::ops
