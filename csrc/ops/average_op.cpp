#include "../rules/average.h"
#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void average_(TensorList averages, TensorList params, const Tensor& weight, const OptionalTensor& found_inf) {
  constexpr const char* op = "average_";
  if (weight.defined() && weight.is_cpu() && weight.numel() == 1)
    check_average_weight(op, "weight", weight.item().toDouble());
  rules::Average rule{};
  const Common common{op, kNone, found_inf, kNone, {}, kNone};
  const CallSpec spec{.common = common, .operands = {{"averages", averages}, {"params", params}}, .leader = 1};
  run<Driver>(rule, spec, {{"weight", rule.weight, weight}});
}

OPTIM_EXT_INSTANTIATE_OP(average_)

}  // namespace optim_ext::ops
