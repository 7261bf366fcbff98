#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "../rules/norm.h"
#include "drivers.h"
#include "ops.h"

namespace optim_ext::ops {

namespace {

// Calls use(rule) with the reduction for a norm type.
template <class Use>
void with_norm(const char* op, double norm_type, const Use& use) {
  if (norm_type == 2.0) return use(rules::L2Norm{});
  if (norm_type == 1.0) return use(rules::L1Norm{});
  if (norm_type == INFINITY) return use(rules::MaxNorm{});
  TORCH_CHECK_VALUE(false, "optim_ext::", op, ": norm_type must be 1, 2 or inf, found ", norm_type);
}

// Checks the tensors of one list, and what may lie beside them, and calls use(call). The square of a complex number is
// the sum of its parts' squares, as if they were two numbers; other norms (`by_modulus`) need the modulus.
template <class Use>
void with_call(const char* op, const char* list, TensorList tensors, bool by_modulus, const Use& use,
               TensorList companions = {}) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::vector<Tensor> moduli;
  if (by_modulus && std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.is_complex(); })) {
    for (const Tensor& tensor : tensors) moduli.push_back(tensor.is_complex() ? at::abs(tensor) : tensor);
    tensors = moduli;
  }
  const StepControls beside{.companions = companions};
  const CallSpec spec{.op = op, .controls = beside, .operands = {{list, tensors}}, .takes_companions = true};
  use(Call(spec, rules::Reduction::kOperands, rules::Reduction::kUsed, rules::Reduction::kUpdates));
}

double checked_limit(const char* name, const std::optional<double>& value) {
  TORCH_CHECK_VALUE(!value || *value >= 0.0, "optim_ext::grad_norm: ", name, " must be at least 0, found ",
                    value.value_or(0.0));
  return value.value_or(0.0);
}

}  // namespace

template <class Driver>
std::tuple<Tensor, Tensor, Tensor> grad_norm(TensorList grads, double norm_type, std::optional<double> max_norm,
                                             bool skip_nonfinite, std::optional<double> skip_above,
                                             const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                                             const OptionalTensor& skips) {
  constexpr const char* kName = "grad_norm";
  std::tuple<Tensor, Tensor, Tensor> results;
  with_norm(kName, norm_type, [&](auto rule) {
    with_call(kName, "grads", grads, norm_type != 2.0, [&](const Call& call) {
      NormOutcome outcome{};
      outcome.policy = {
          checked_limit("max_norm", max_norm),
          checked_limit("skip_above", skip_above),
          max_norm.has_value(),
          skip_nonfinite,
          skip_above.has_value(),
          std::any_of(call.bundles.begin(), call.bundles.end(), [](const Bundle& b) { return b.in_double; })};
      const auto given = [&](const OptionalTensor& value, const char* name, at::ScalarType dtype) {
        return scalar_data(kName, name, value, call.device, {dtype});
      };
      outcome.grad_scale = static_cast<const float*>(given(grad_scale, "grad_scale", at::kFloat));
      outcome.found_inf = static_cast<const float*>(given(found_inf, "found_inf", at::kFloat));
      if (given(skips, "skips", at::kLong)) outcome.skips = static_cast<int64_t*>(skips->mutable_data_ptr());
      const auto result = [&](at::ScalarType dtype) {
        return at::empty({}, at::TensorOptions().device(call.device).dtype(dtype));
      };
      results = {result(outcome.policy.in_double ? at::kDouble : at::kFloat), result(at::kDouble), result(at::kFloat)};
      outcome.norm = std::get<0>(results).mutable_data_ptr();
      outcome.grad_factor = std::get<1>(results).template mutable_data_ptr<double>();
      outcome.skip = std::get<2>(results).template mutable_data_ptr<float>();
      if (std::any_of(call.bundles.begin(), call.bundles.end(), [](const Bundle& b) { return b.numel != 0; })) {
        Driver::template reduce_all<decltype(rule)>(call, outcome);
      } else {  // no element at all: the norm is that of a zero
        const Tensor zero = at::zeros({}, at::TensorOptions().device(call.device));
        with_call(kName, "grads", zero, false,
                  [&](const Call& of_zero) { Driver::template reduce_all<decltype(rule)>(of_zero, outcome); });
      }
      if (outcome.skips) note_write(*skips);
    });
  });
  return results;
}

template <class Driver>
Tensor norms(TensorList tensors, double norm_type) {
  Tensor results;
  with_norm("norms", norm_type, [&](auto rule) {
    with_call("norms", "tensors", tensors, norm_type != 2.0, [&](const Call& call) {
      results =
          at::empty({static_cast<int64_t>(tensors.size())}, at::TensorOptions().device(call.device).dtype(at::kDouble));
      Driver::template reduce_each<decltype(rule)>(call, results.template mutable_data_ptr<double>());
    });
  });
  return results;
}

template <class Driver>
Tensor root_mean_squares(TensorList tensors, TensorList companions) {
  Tensor results;
  const auto reduce = [&](const Call& call) {
    results =
        at::empty({static_cast<int64_t>(tensors.size())}, at::TensorOptions().device(call.device).dtype(at::kDouble));
    Driver::template reduce_each<rules::RootMeanSquare>(call, results.template mutable_data_ptr<double>());
  };
  with_call("root_mean_squares", "tensors", tensors, false, reduce, companions);
  return results;
}

template <class Driver>
Tensor count_nonfinite(TensorList tensors) {
  Tensor results;
  with_call("count_nonfinite", "tensors", tensors, false, [&](const Call& call) {
    results =
        at::empty({static_cast<int64_t>(tensors.size())}, at::TensorOptions().device(call.device).dtype(at::kDouble));
    Driver::template reduce_each<rules::NonFinite>(call, results.template mutable_data_ptr<double>());
  });
  return results.to(at::kLong);
}

OPTIM_EXT_INSTANTIATE_OP(grad_norm)
OPTIM_EXT_INSTANTIATE_OP(norms)
OPTIM_EXT_INSTANTIATE_OP(root_mean_squares)
OPTIM_EXT_INSTANTIATE_OP(count_nonfinite)

}  // namespace optim_ext::ops
