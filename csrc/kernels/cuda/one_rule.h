// What a unit that holds the kernels of one rule, compiled while the process runs, is made with: this header, the rule,
// and two lines, OPTIM_EXT_EXPORT_SWEEP and OPTIM_EXT_EXPORT_ADVANCE. (Such units are written by
// optim_ext/_rules/native_text.py.)
#include "sweep_block.h"
#include "../../rules/words.h"

namespace optim_ext::cuda {

// With five operands and more these rules, which are longer than ours, need more than 80 registers.
template <class Rule>
constexpr int min_blocks_of(bool averaged) {
  return kSlots<Rule> > 4 ? 2 : min_blocks(averaged);
}

}  // namespace optim_ext::cuda

// Kernels are found by their names. V: float or double. `averaged`: of steps that also average their parameters.
#define OPTIM_EXT_EXPORT_SWEEP(name, Rule, V, averaged)                                                  \
  extern "C" OPTIM_EXT_KERNEL(optim_ext::cuda::kThreads, optim_ext::cuda::min_blocks_of<Rule>(averaged)) \
      name(OPTIM_EXT_ARGUMENT(optim_ext::cuda::Args<Rule, optim_ext::cuda::kArgumentBytes>) args) {      \
    optim_ext::cuda::sweep_block<Rule, V, averaged>(args);                                               \
  }

// `bytes_of_rule` is the size that the host takes it for.
#define OPTIM_EXT_EXPORT_ADVANCE(Rule, bytes_of_rule)                                          \
  static_assert(optim_ext::cuda::shape_of<Rule>().bytes == bytes_of_rule);                     \
  extern "C" OPTIM_EXT_KERNEL(optim_ext::cuda::kThreads) optim_ext_advance_scalars(            \
      OPTIM_EXT_ARGUMENT(optim_ext::cuda::Args<Rule, optim_ext::cuda::kArgumentBytes>) args) { \
    optim_ext::cuda::advance_scalars_of_thread(args);                                          \
  }
