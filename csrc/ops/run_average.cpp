#include "run_average.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <vector>

#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

std::optional<Tensor> moved_to(at::Device device, const OptionalTensor& value) {
  return value && value->device() != device ? OptionalTensor(value->to(device, /*non_blocking=*/!device.is_cpu()))
                                            : value;
}

Tensor weight_for(c10::Device device, const Tensor& weight) {
  return weight.is_cpu() ? weight : *moved_to(device, weight);
}

void run_average(TensorList averages, TensorList params, const Tensor& weight, const OptionalTensor& found_inf,
                 bool check_only) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Device device = averages[0].device();
  std::vector<Tensor> copies;
  if (std::any_of(params.begin(), params.end(), [&](const Tensor& t) { return t.device() != device; })) {
    for (const Tensor& param : params) copies.push_back(*moved_to(device, param));
    params = copies;
  }
  const Tensor here = weight_for(device, weight);
  const OptionalTensor found = moved_to(device, found_inf);
  if (check_only) {
    const CheckOnly guard;
#if defined(OPTIM_EXT_WITH_CUDA)
    if (device.is_cuda()) return average_<CudaDriver>(averages, params, here, found);
#endif
    return average_<CpuDriver>(averages, params, here, found);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("optim_ext::average_", "")
                             .typed<void(TensorList, TensorList, const Tensor&, const OptionalTensor&)>();
  op.call(averages, params, here, found);
}

}  // namespace optim_ext::ops
