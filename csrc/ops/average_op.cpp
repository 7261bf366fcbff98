#include "../rules/average.h"
#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void average_(TensorList averages, TensorList params, const Tensor& weight, const OptionalTensor& found_inf) {
  constexpr const char* op = "average_";
  if (weight.defined() && weight.is_cpu() && weight.numel() == 1)
    check_average_weight(op, "weight", weight.item().toDouble());
  in_turns(op, {.found_inf = found_inf}, averages, [&](const StepControls& controls, const Members& of) {
    const TensorList chosen = of(averages), their_params = of(params);
    const CallSpec spec{
        .op = op, .controls = controls, .operands = {{"averages", chosen}, {"params", their_params}}, .leader = 1};
    rules::Average rule{};
    run<Driver>(rule, spec, {{"weight", rule.weight, weight}});
  });
}

OPTIM_EXT_INSTANTIATE_OP(average_)

}  // namespace optim_ext::ops
