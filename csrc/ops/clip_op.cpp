#include <cmath>

#include "../rules/clip.h"
#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void clip_(TensorList tensors, std::optional<double> limit, const OptionalTensor& factor) {
  constexpr const char* op = "clip_";
  in_turns(op, {.grad_factor = factor}, tensors, [&](const StepControls& controls, const Members& of) {
    const TensorList chosen = of(tensors);
    const CallSpec spec{op, controls, {{"tensors", chosen}, {"tensors", chosen}}};
    rules::Clip rule{};
    run<Driver>(rule, spec, {{"limit", rule.limit, limit.value_or(INFINITY)}});
  });
}

OPTIM_EXT_INSTANTIATE_OP(clip_)

}  // namespace optim_ext::ops
