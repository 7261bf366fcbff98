#include "call.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/hash.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <sstream>
#include <unordered_set>

namespace optim_ext::ops {

namespace {

constexpr int kParam = 0, kGrad = 1;

thread_local int check_only_depth = 0;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Same order of elements in memory; the stride of a dimension of size one means nothing.
bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), sa = a.strides(), sb = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && sa[d] != sb[d]) return false;
  }
  return true;
}

double host_value(const void* data, Storage storage) {
  switch (storage) {
    case Storage::f32: return *static_cast<const float*>(data);
    case Storage::f64: return *static_cast<const double*>(data);
    default: TORCH_INTERNAL_ASSERT(false, "scalars are float or double here");
  }
}

// Memory one tensor of a call writes. `key` tells apart strided tensors that span the same addresses.
struct Interval {
  const char* begin;
  const char* end;
  size_t key;  // 0 for dense memory
  const at::Tensor* tensor;
  bool operator==(const Interval& other) const { return begin == other.begin && end == other.end && key == other.key; }
};

Interval interval_of(const at::Tensor& tensor) {
  int64_t span = 1;
  size_t key = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    span += (tensor.size(d) - 1) * tensor.stride(d);
    key = c10::hash_combine(key, c10::get_hash(tensor.size(d), tensor.stride(d)));
  }
  const char* const begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + span * tensor.element_size(), tensor.is_non_overlapping_and_dense() ? 0 : key | 1, &tensor};
}

void collect_addresses(const at::Tensor& tensor, int64_t d, const char* at, std::unordered_set<const char*>& out) {
  if (d == tensor.dim()) {
    out.insert(at);
    return;
  }
  for (int64_t i = 0; i < tensor.size(d); ++i) {
    collect_addresses(tensor, d + 1, at + i * tensor.stride(d) * tensor.element_size(), out);
  }
}

// Whether two tensors whose intervals meet share an element. Views may interleave (the columns of one matrix), so where
// one of them is strided the elements themselves are compared.
bool share_elements(const Interval& a, const Interval& b) {
  if (a.key == 0 && b.key == 0) return true;
  std::unordered_set<const char*> first, second;
  collect_addresses(*a.tensor, 0, a.begin, first);
  collect_addresses(*b.tensor, 0, b.begin, second);
  return std::any_of(second.begin(), second.end(), [&](const char* at) { return first.count(at) != 0; });
}

// Memory written by one call must be disjoint: the sweep runs in parallel. Sorting thousands of addresses at every step
// would cost more than a small model's update, so lists found disjoint are remembered by content. Returns the offender.
const at::Tensor* find_overlap(const std::vector<Interval>& intervals) {
  thread_local std::array<std::vector<Interval>, 8> known;
  thread_local size_t next = 0;
  for (const auto& list : known) {
    if (list == intervals) return nullptr;
  }
  std::vector<Interval> sorted = intervals, open;
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  for (const Interval& interval : sorted) {
    std::erase_if(open, [&](const Interval& other) { return other.end <= interval.begin; });
    for (const Interval& other : open) {
      if (share_elements(other, interval)) return interval.tensor;
    }
    open.push_back(interval);
  }
  known[next++ % known.size()] = intervals;
  return nullptr;
}

}  // namespace

std::optional<Storage> storage_of(at::ScalarType dtype) {
  switch (c10::toRealValueType(dtype)) {
    case at::kFloat: return Storage::f32;
    case at::kDouble: return Storage::f64;
    case at::kBFloat16: return Storage::bf16;
    case at::kHalf: return dtype == at::kHalf ? std::optional(Storage::f16) : std::nullopt;  // no complex of halves
    default: return std::nullopt;
  }
}

void note_write(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

BadInput::BadInput(const std::string& op, const std::string& list, int64_t index, const std::string& problem)
    : c10::Error(text("optim_ext::", op, ": ", list, index < 0 ? "" : text("[", index, "]"), " ", problem),
                 c10::Backtrace()),
      list(list),
      problem(problem),
      index(index) {}

void Call::refuse(const char* list, int64_t index, const std::string& problem) const {
  throw BadInput(spec_.common.op, list, index, problem);
}

Call::Call(const CallSpec& spec, int operands, unsigned used, unsigned updates)
    : spec_(spec), operands_(operands), used_(used), updates_(updates) {
  check_lengths();
  const auto params = spec_.operands.begin()[kParam].tensors;
  if (params.empty()) return;
  if (!params[0].defined()) refuse("params", 0, "is undefined");
  device = params[0].device();
  bundles.reserve(params.size());
  in_double.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) add_bundle(static_cast<int64_t>(i));
  read_pass();
  if (pass.unscale || pass.device_grad_scale) {
    for (size_t i = 0; i < params.size(); ++i) {
      if (at::has_internal_overlap(spec_.operands.begin()[kGrad].tensors[i]) == at::MemOverlap::Yes) {
        refuse("grads", static_cast<int64_t>(i),
               "has elements that share memory (an expanded tensor?), so it cannot be unscaled in place");
      }
    }
  }
  check_overlap();
}

void Call::check_lengths() const {
  const auto lists = spec_.operands.begin();
  const size_t n = lists[kParam].tensors.size();
  for (int k = 0; k < operands_; ++k) {
    const size_t found = lists[k].tensors.size();
    const bool used = (used_ >> k) & 1u;
    TORCH_CHECK_VALUE(found == n || (!used && found == 0), "optim_ext::", spec_.common.op, ": params has ", n,
                      " tensors but ", lists[k].name, " has ", found, "; the lists must be equally long");
  }
  TORCH_CHECK_VALUE(!spec_.state_steps || spec_.state_steps->size() == n, "optim_ext::", spec_.common.op,
                    ": params has ", n, " tensors but state_steps has ", spec_.state_steps->size(),
                    "; the lists must be equally long");
}

void Call::add_bundle(int64_t i) {
  const auto lists = spec_.operands.begin();
  const at::Tensor& param = lists[kParam].tensors[i];
  Bundle bundle{};
  bool flat = true, use_double = false;
  for (int k = 0; k < operands_; ++k) {
    if (!((used_ >> k) & 1u)) continue;
    const at::Tensor& tensor = lists[k].tensors[i];
    const char* const name = lists[k].name;
    if (!tensor.defined()) refuse(name, i, "is undefined");
    if (tensor.layout() != at::kStrided)
      refuse(name, i, text("has layout ", tensor.layout(), ", expected ", at::kStrided));
    if (tensor.device() != device) refuse(name, i, text("is on ", tensor.device(), ", expected ", device));
    const auto storage = storage_of(tensor.scalar_type());
    if (!storage) {
      refuse(name, i,
             text("has dtype ", tensor.scalar_type(),
                  ", expected a floating point or complex type (Float, Double, BFloat16, Half, ComplexFloat, "
                  "ComplexDouble)"));
    }
    if (k != kParam) {
      if (tensor.is_complex() != param.is_complex()) {
        refuse(name, i,
               text("has dtype ", tensor.scalar_type(), ", expected ",
                    param.is_complex() ? "a complex type as its parameter's, " : "a real type as its parameter's, ",
                    param.scalar_type()));
      }
      if (!tensor.sizes().equals(param.sizes()))
        refuse(name, i, text("has shape ", tensor.sizes(), ", expected its parameter's shape ", param.sizes()));
    }
    if (tensor.is_conj() || tensor.is_neg())
      refuse(name, i, "is a lazy conjugate or negative view; call resolve_conj() and resolve_neg() on it");
    if ((updates_ >> k) & 1u) {
      if (!tensor.is_non_overlapping_and_dense() && at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
        refuse(name, i, "has elements that share memory (an expanded tensor?), so it cannot be updated in place");
      }
      if (tensor.is_inference() && !c10::InferenceMode::is_enabled()) {
        refuse(name, i, "is an inference tensor; it can only be updated inside torch.inference_mode()");
      }
    }
    const bool written = ((updates_ | (spec_.common.grad_scale ? 1u << kGrad : 0u)) >> k) & 1u;
    bundle.data[k] = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    bundle.storage[k] = *storage;
    use_double |= *storage == Storage::f64;
    if (k == kParam) {
      flat &= tensor.is_non_overlapping_and_dense();
    } else {
      flat &= (tensor.is_contiguous() && param.is_contiguous()) || same_strides(tensor, param);
    }
  }
  bundle.numel = param.numel() * (param.is_complex() ? 2 : 1);
  if (!flat && param.numel() > 1) add_layout(i, bundle);
  if (spec_.state_steps) add_step(i, bundle);
  bundles.push_back(bundle);
  in_double.push_back(use_double);
}

// The walk order is the parameter's own memory order, so that a dense parameter is still read front to back.
void Call::add_layout(int64_t i, Bundle& bundle) {
  const auto lists = spec_.operands.begin();
  const at::Tensor& param = lists[kParam].tensors[i];
  const int64_t width = param.is_complex() ? 2 : 1;
  struct Dim {
    int64_t size;
    std::array<int64_t, kMaxOperands> strides;
  };
  std::vector<Dim> dims;
  for (int64_t d = 0; d < param.dim(); ++d) {
    if (param.size(d) == 1) continue;
    Dim dim{param.size(d), {}};
    for (int k = 0; k < operands_; ++k) {
      if ((used_ >> k) & 1u) dim.strides[k] = lists[k].tensors[i].stride(d) * width;
    }
    dims.push_back(dim);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dim& a, const Dim& b) { return a.strides[kParam] > b.strides[kParam]; });
  if (width == 2) {
    Dim pair{2, {}};
    pair.strides.fill(1);
    dims.push_back(pair);
  }
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    bool joins = !merged.empty();
    for (int k = 0; joins && k < operands_; ++k) {
      if ((used_ >> k) & 1u) joins = merged.back().strides[k] == dim.strides[k] * dim.size;
    }
    if (joins) {
      merged.back().size *= dim.size;
      merged.back().strides = dim.strides;
    } else {
      merged.push_back(dim);
    }
  }
  if (merged.size() > static_cast<size_t>(kMaxDims)) {
    refuse("params", i,
           text("and its gradient or state differ in memory layout over more than ", kMaxDims,
                " dimensions; make them contiguous"));
  }
  Layout& layout = layouts_.emplace_back();
  layout.ndim = static_cast<int32_t>(merged.size());
  for (size_t d = 0; d < merged.size(); ++d) {
    layout.sizes[d] = merged[d].size;
    for (int k = 0; k < operands_; ++k) layout.strides[k][d] = merged[d].strides[k];
  }
  bundle.layout = &layout;
}

void Call::add_step(int64_t i, Bundle& bundle) {
  const at::Tensor& step = (*spec_.state_steps)[i];
  if (!step.defined()) refuse("state_steps", i, "is undefined");
  if (step.numel() != 1 || step.layout() != at::kStrided)
    refuse("state_steps", i, text("has shape ", step.sizes(), ", expected a tensor with one element"));
  if (step.scalar_type() != at::kFloat && step.scalar_type() != at::kDouble)
    refuse("state_steps", i, text("has dtype ", step.scalar_type(), ", expected Float or Double"));
  if (!step.is_cpu() && step.device() != device)
    refuse("state_steps", i, text("is on ", step.device(), ", expected cpu or ", device));
  bundle.step_storage = *storage_of(step.scalar_type());
  if (step.is_cpu()) {
    const double count = host_value(step.const_data_ptr(), bundle.step_storage);
    if (!(count >= 0.0) || std::isinf(count))
      refuse("state_steps", i, text("is ", count, ", expected a count of steps"));
  } else {
    bundle.device_step = step.mutable_data_ptr();
    steps_on_device = true;
  }
}

void Call::read_pass() {
  const auto one_number = [&](const std::optional<at::Tensor>& value, const char* name, bool or_double) -> const void* {
    if (!value || !value->defined()) return nullptr;
    const bool fits = value->scalar_type() == at::kFloat || (or_double && value->scalar_type() == at::kDouble);
    TORCH_CHECK_VALUE(value->numel() == 1 && fits && value->layout() == at::kStrided, "optim_ext::", spec_.common.op,
                      ": ", name, " must be one Float ", or_double ? "or Double " : "", "element, found ",
                      value->scalar_type(), " of shape ", value->sizes());
    TORCH_CHECK_VALUE(value->device() == device, "optim_ext::", spec_.common.op, ": ", name, " is on ", value->device(),
                      ", expected ", device);
    return value->const_data_ptr();
  };
  const auto* const scale = static_cast<const float*>(one_number(spec_.common.grad_scale, "grad_scale", false));
  const auto* const found = static_cast<const float*>(one_number(spec_.common.found_inf, "found_inf", false));
  const void* const factor = one_number(spec_.common.grad_factor, "grad_factor", true);
  if (factor) pass.grad_factor_storage = *storage_of(spec_.common.grad_factor->scalar_type());
  if (device.is_cpu()) {
    pass.unscale = scale != nullptr;
    if (scale) pass.grad_scale = *scale;
    if (factor) pass.grad_factor = host_value(factor, pass.grad_factor_storage);
    skip = found && *found == 1.0f;
    return;
  }
  pass.device_grad_scale = scale;
  pass.device_found_inf = found;
  pass.device_grad_factor = factor;
  if (!found || !spec_.state_steps) return;
  for (size_t i = 0; i < bundles.size(); ++i) {
    if (!bundles[i].device_step)
      refuse("state_steps", static_cast<int64_t>(i),
             text("is on cpu, but whether the step is skipped is known on ", device, " only; move it there"));
  }
}

void Call::check_overlap() const {
  const auto lists = spec_.operands.begin();
  const unsigned written = updates_ | (pass.unscale || pass.device_grad_scale ? 1u << kGrad : 0u);
  std::vector<Interval> intervals;
  intervals.reserve(bundles.size() * operands_);
  for (size_t i = 0; i < bundles.size(); ++i) {
    for (int k = 0; bundles[i].numel != 0 && k < operands_; ++k) {
      if ((written >> k) & 1u) intervals.push_back(interval_of(lists[k].tensors[i]));
    }
  }
  const at::Tensor* const offender = find_overlap(intervals);
  if (offender == nullptr) return;
  for (size_t i = 0; i < bundles.size(); ++i) {
    for (int k = 0; k < operands_; ++k) {
      if (((written >> k) & 1u) && &lists[k].tensors[i] == offender) {
        refuse(lists[k].name, static_cast<int64_t>(i),
               "overlaps in memory with another tensor this step writes; each needs memory of its own");
      }
    }
  }
}

void Call::set(std::initializer_list<Hyper> hypers, const void* rule, size_t rule_size) {
  for (const Hyper& hyper : hypers) {
    const auto offset = reinterpret_cast<const char*>(hyper.slot) - static_cast<const char*>(rule);
    TORCH_INTERNAL_ASSERT(offset >= 0 && offset + sizeof(double) <= rule_size);
    double value = hyper.value;
    if (hyper.tensor) {
      const at::Tensor& tensor = *hyper.tensor;
      TORCH_CHECK_VALUE(tensor.defined() && tensor.numel() == 1 && !tensor.is_complex(), "optim_ext::", spec_.common.op,
                        ": ", hyper.name, " must be a number or a real tensor with one element");
      if (!tensor.is_cpu() && tensor.device() == device) {
        const auto storage = storage_of(tensor.scalar_type());
        TORCH_CHECK_VALUE(storage, "optim_ext::", spec_.common.op, ": ", hyper.name, " has dtype ",
                          tensor.scalar_type(), ", expected a floating point type");
        device_hypers.push_back({offset, tensor.const_data_ptr(), *storage});
        continue;
      }
      value = tensor.item().toDouble();
    }
    TORCH_CHECK_VALUE(!std::isnan(value), "optim_ext::", spec_.common.op, ": ", hyper.name, " is NaN");
    *hyper.slot = value;
  }
}

void Call::commit() {
  const auto lists = spec_.operands.begin();
  for (size_t i = 0; i < bundles.size(); ++i) {
    for (int k = 0; k < operands_; ++k) {
      if ((updates_ >> k) & 1u) note_write(lists[k].tensors[i]);
    }
    if (!spec_.state_steps) continue;
    const at::Tensor& step = (*spec_.state_steps)[i];
    note_write(step);
    if (!step.is_cpu()) continue;
    if (bundles[i].step_storage == Storage::f32) {
      bundles[i].step = *step.mutable_data_ptr<float>() += 1.0f;
    } else {
      bundles[i].step = *step.mutable_data_ptr<double>() += 1.0;
    }
  }
}

CheckOnly::CheckOnly() { ++check_only_depth; }
CheckOnly::~CheckOnly() { --check_only_depth; }
bool CheckOnly::active() { return check_only_depth > 0; }

}  // namespace optim_ext::ops
