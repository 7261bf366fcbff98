#include <cmath>

#include "../rules/clip.h"
#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

template <class Driver>
void clip_(TensorList tensors, std::optional<double> limit, const OptionalTensor& factor) {
  const Common common{"clip_", kNone, kNone, factor, {}, kNone};
  const CallSpec spec{common, {{"tensors", tensors}, {"tensors", tensors}}};
  rules::Clip rule{};
  run<Driver>(rule, spec, {{"limit", rule.limit, limit.value_or(INFINITY)}});
}

OPTIM_EXT_INSTANTIATE_OP(clip_)

}  // namespace optim_ext::ops
