#include "call.h"

#include <algorithm>
#include <cmath>

#include "../kernels/convert.h"
#include "parallel.h"
#include "tensors.h"
#include "turns.h"

namespace optim_ext::ops {

namespace {
thread_local int check_only_depth = 0;
}  // namespace

void Call::refuse(const char* list, int64_t index, const std::string& problem) const {
  throw BadInput(spec_.op, list, index, problem);
}

Call::Call(const CallSpec& spec, int operands, unsigned used, unsigned updates, Handover* handover)
    : handover_(handover),
      spec_(spec),
      rule_{spec.operands.begin(),
            operands,
            spec.leader,
            used,
            updates,
            updates | (spec.controls.grad_scale ? 1u << kGrad : 0u)},
      averaging_lists_{{"averages", spec.controls.averages}, spec.operands.begin()[kParam]},
      averaging_{averaging_lists_,      rules::Average::kOperands, 1,
                 rules::Average::kUsed, rules::Average::kUpdates,  rules::Average::kUpdates} {
  if (handover && handover->kind == Handover::Kind::offer && handover->prepared.fits(spec, used, updates)) {
    loan_.take(handover->prepared.bundles);
    at_one_point = handover->prepared.at_one_point;
    handover->taken = true;
    read_pass();
    return;
  }
  check_lengths();
  const auto params = rule_.lists[kParam].tensors;
  if (params.empty()) return;
  if (!params[0].defined()) refuse(rule_.lists[kParam].name, 0, "is undefined");
  device = params[0].device();
  if (rule_.written != 0 && !OverlapsChecked::active()) known_ = KnownCalls::current().all();
  make_bundles();
  read_pass();
  if (pass.unscale || pass.on_device.grad_scale) {
    for (size_t i = 0; i < params.size(); ++i) {
      if (shares_elements(rule_.lists[kGrad].tensors[i])) {
        refuse("grads", static_cast<int64_t>(i),
               "has elements that share memory (an expanded tensor?), so it cannot be unscaled in place");
      }
    }
  }
  if (rule_.written != 0 && !OverlapsChecked::active()) check_overlap();
  if (handover && handover->kind == Handover::Kind::look && is_plain()) {
    Prepared& found = handover->prepared;
    found.op = spec.op;
    found.used = used;
    found.updates = updates;
    found.bundles = bundles;
  }
}

// Whether the bundles say all there is to say of the tensors, for as long as these stay what they are.
bool Call::is_plain() const {
  return device.is_cpu() && !spec_.controls.grad_scale && averages_.empty() && companions_.empty() &&
         spec_.scalars.size() == 0 && spec_.partial.size() == 0 && spec_.leader == kParam && spec_.counts &&
         !OverlapsChecked::active() && std::all_of(bundles.begin(), bundles.end(), [](const Bundle& bundle) {
           return bundle.layout == nullptr && bundle.numel > 0;
         });
}

bool Call::leave(const RuleProgram& program, const void* rule) {
  if (!loan_) return false;
  handover_->sweep.emplace(program, rule, handover_->prepared.bundles, pass);
  return true;
}

void Call::set(std::initializer_list<Hyper> hypers, const void* rule, size_t rule_size) {
  for (const Hyper& hyper : hypers) {
    const auto offset = reinterpret_cast<const char*>(hyper.slot) - static_cast<const char*>(rule);
    TORCH_INTERNAL_ASSERT(offset >= 0 && offset + sizeof(double) <= rule_size);
    double value = hyper.value;
    if (hyper.tensor) {
      const at::Tensor& tensor = *hyper.tensor;
      TORCH_CHECK_VALUE(tensor.defined() && tensor.numel() == 1 && !tensor.is_complex(), "optim_ext::", spec_.op, ": ",
                        hyper_name(hyper.key, hyper.index), " must be a number or a real tensor with one element");
      // Scalar state on the host that depends on this value makes the host wait for it, as torch does.
      if (!tensor.is_cpu() && tensor.device() == device && !(host_scalars_ && hyper.in_scalars)) {
        const auto storage = storage_of(tensor.scalar_type());
        TORCH_CHECK_VALUE(storage, "optim_ext::", spec_.op, ": ", hyper_name(hyper.key, hyper.index), " has dtype ",
                          tensor.scalar_type(), ", expected a floating point type");
        device_hypers.push_back({offset, tensor.const_data_ptr(), *storage});
        continue;
      }
      value = tensor.item().toDouble();
    }
    if (std::isnan(value))
      throw BadHyper(text("optim_ext::", spec_.op, ": ", hyper_name(hyper.key, hyper.index), " is NaN"), false);
    *hyper.slot = value;
  }
}

void Call::note_writes() const {
  over_tensors(device, static_cast<int64_t>(bundles.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int k = 0; k < rule_.count; ++k) {
        if (rule_.is_updated(k)) note_write(rule_.lists[k].tensors[i]);
      }
      if (bundles[i].average) note_write(averaging_lists_[0].tensors[i]);
      for (size_t kind = 0; bundles[i].companions && kind < companion_kinds(); ++kind) note_write(companion(kind, i));
      if (spec_.state_steps && spec_.counts) note_write((*spec_.state_steps)[i]);
    }
  });
}

void Call::commit() {
  note_writes();
  for (size_t i = 0; i < bundles.size(); ++i) advance(static_cast<int64_t>(i));
}

void Call::commit(const RuleProgram& program, const void* rule) {
  commit();
  store_scalars(program, rule);
}

void Call::store_scalars(const RuleProgram& program, const void* rule) {
  if (!program.stores_scalars) return;
  const int stored = static_cast<int>(spec_.scalars.size());
  alignas(double) unsigned char ready[kMaxRuleBytes];
  for (size_t i = 0; i < bundles.size(); ++i) {
    rules::Scalar after[kMaxScalars] = {};
    if (host_scalars_) make_ready(program, rule, bundles[i], ready, after);
    for (int k = 0; k < stored; ++k) store_scalar(static_cast<int64_t>(i), k, after[k].value);
  }
}

void Call::keep_all(const at::Tensor& factor) {
  for (Bundle& bundle : bundles) {
    if (steps_on_device && bundle.device_step) bundle.step = 1.0;
  }
  steps_on_device = draws_on_device = false;
  if (pass.unscale) {
    pass.grad_factor /= pass.grad_scale;
    pass.unscale = false;
  }
  if (!factor.defined()) return;
  pass.on_device.grad_scale = nullptr;
  pass.on_device.grad_factor = held_.emplace_back(factor).const_data_ptr();
  pass.on_device.grad_factor_storage = Storage::f64;
}

// In order, as a count may serve several parameters.
void Call::advance(int64_t i) {
  for (size_t kind = 0; bundles[i].companions && kind < companion_kinds(); ++kind) {
    const at::Tensor& key = companion(kind, i);
    if (key.is_cpu() && key.scalar_type() == at::kLong && !follows_key(kind, i))
      ++static_cast<RoundingKey*>(key.mutable_data_ptr())->draws;
  }
  if (!spec_.state_steps || !spec_.counts) return;
  const at::Tensor& step = (*spec_.state_steps)[i];
  if (!step.is_cpu()) return;
  if (bundles[i].step_storage == Storage::f32) {
    bundles[i].step = *step.mutable_data_ptr<float>() += 1.0f;
  } else {
    bundles[i].step = *step.mutable_data_ptr<double>() += 1.0;
  }
}

void Call::store_scalar(int64_t i, int k, double value) {
  const at::Tensor& tensor = spec_.scalars.begin()[k].tensors[i];
  note_write(tensor);
  if (tensor.is_cpu()) store_element<double>(tensor.mutable_data_ptr(), bundles[i].scalars[k].storage, 0, value);
}

void Call::read_average_weight() {
  if (averages_.empty()) return;
  const auto& weight = spec_.controls.average_weight;
  const bool fits = weight && weight->defined() && weight->numel() == 1 && weight->layout() == at::kStrided &&
                    (weight->scalar_type() == at::kFloat || weight->scalar_type() == at::kDouble) &&
                    (weight->is_cpu() || weight->device() == device);
  TORCH_CHECK_VALUE(fits, "optim_ext::", spec_.op,
                    ": with averages, average_weight must be one Float or Double element on cpu or ", device);
  pass.on_device.average_weight_storage = *storage_of(weight->scalar_type());
  if (!weight->is_cpu()) {
    pass.on_device.average_weight = weight->const_data_ptr();
    return;
  }
  pass.average_weight = host_value(weight->const_data_ptr(), pass.on_device.average_weight_storage);
  check_average_weight(spec_.op, "average_weight", pass.average_weight);
}

const void* scalar_data(const char* op, const char* name, const std::optional<at::Tensor>& value, at::Device device,
                        at::ArrayRef<at::ScalarType> dtypes) {
  if (!value || !value->defined()) return nullptr;
  const bool fits = std::find(dtypes.begin(), dtypes.end(), value->scalar_type()) != dtypes.end();
  TORCH_CHECK_VALUE(value->numel() == 1 && fits && value->layout() == at::kStrided, "optim_ext::", op, ": ", name,
                    " must be one ", c10::Join(" or ", dtypes), " element, found ", value->scalar_type(), " of shape ",
                    value->sizes());
  TORCH_CHECK_VALUE(value->device() == device, "optim_ext::", op, ": ", name, " is on ", value->device(), ", expected ",
                    device);
  return value->const_data_ptr();
}

void Call::read_pass() {
  const auto given = [&](const std::optional<at::Tensor>& value, const char* name,
                         at::ArrayRef<at::ScalarType> dtypes) {
    return scalar_data(spec_.op, name, value, device, dtypes);
  };
  const auto* const scale = static_cast<const float*>(given(spec_.controls.grad_scale, "grad_scale", {at::kFloat}));
  const auto* const found = static_cast<const float*>(given(spec_.controls.found_inf, "found_inf", {at::kFloat}));
  const void* const factor = given(spec_.controls.grad_factor, "grad_factor", {at::kFloat, at::kDouble});
  read_average_weight();
  if (factor) pass.on_device.grad_factor_storage = *storage_of(spec_.controls.grad_factor->scalar_type());
  if (device.is_cpu()) {
    pass.unscale = scale != nullptr;
    if (scale) pass.grad_scale = *scale;
    if (factor) pass.grad_factor = host_value(factor, pass.on_device.grad_factor_storage);
    skip = found && *found == 1.0f;
    return;
  }
  pass.on_device.grad_scale = scale;
  pass.on_device.found_inf = found;
  pass.on_device.grad_factor = factor;
  if (!found) return;
  const auto must_be_there = [&](const List& list) {
    for (size_t i = 0; i < list.tensors.size(); ++i) {
      if (list.tensors[i].is_cpu())
        refuse(list.name, static_cast<int64_t>(i),
               text("is on cpu, but whether the step is skipped is known on ", device, " only; move it there"));
    }
  };
  if (spec_.state_steps) must_be_there({"state_steps", *spec_.state_steps});
  std::for_each(spec_.scalars.begin(), spec_.scalars.end(), must_be_there);
}

CheckOnly::CheckOnly() { ++check_only_depth; }
CheckOnly::~CheckOnly() { --check_only_depth; }
bool CheckOnly::active() { return check_only_depth > 0; }

}  // namespace optim_ext::ops
