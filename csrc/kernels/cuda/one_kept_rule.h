// What one_rule.h is, for the kernel of a rule that steps parameters and state kept in another way than the rule sees
// them. A header of its own, so that units without such a kernel do not compile what it is made of.
#include "one_rule.h"
#include "kept_block.h"

namespace optim_ext::cuda {

// A thread has 8 elements of each operand at a time. Ten operands, the most there are, need more than the 128 registers
// that two blocks leave it.
template <class Rule>
constexpr int kMinKeptBlocks = kSlots<Rule> > 7 ? 1 : 2;

}  // namespace optim_ext::cuda

// `averaged`: for steps that also average their parameters.
#define OPTIM_EXT_EXPORT_KEPT_SWEEP(name, Rule, averaged)                                           \
  extern "C" OPTIM_EXT_KERNEL(optim_ext::cuda::kThreads, optim_ext::cuda::kMinKeptBlocks<Rule>)     \
      name(OPTIM_EXT_ARGUMENT(optim_ext::cuda::Args<Rule, optim_ext::cuda::kArgumentBytes>) args) { \
    optim_ext::cuda::sweep_kept_block<Rule, averaged>(args);                                        \
  }

// `bytes_of_rule` is the size that the host takes it for.
#define OPTIM_EXT_EXPORT_KEPT_ADVANCE(Rule, bytes_of_rule)                                     \
  static_assert(optim_ext::cuda::shape_of<Rule>().bytes == bytes_of_rule);                     \
  extern "C" OPTIM_EXT_KERNEL(optim_ext::cuda::kThreads) optim_ext_advance_kept_scalars(       \
      OPTIM_EXT_ARGUMENT(optim_ext::cuda::Args<Rule, optim_ext::cuda::kArgumentBytes>) args) { \
    optim_ext::cuda::advance_scalars_of_thread<Rule, optim_ext::cuda::KeptEntry<Rule>>(args);  \
  }
