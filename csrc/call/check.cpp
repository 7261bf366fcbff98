// Tensors that are not like the others of their list are looked into one by one, in their order.
#include <ATen/SparseTensorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../kernels/convert.h"
#include "../memory/strided.h"
#include "call.h"
#include "tensors.h"

namespace optim_ext::ops {

namespace {

using memory::SparseIndices, memory::SparseRows;

const at::SparseTensorImpl& sparse_parts(const at::Tensor& tensor) {
  return *static_cast<const at::SparseTensorImpl*>(tensor.unsafeGetTensorImpl());
}

// Of the gradient of a parameter of these sizes.
SparseIndices indices_of(const at::Tensor& grad, at::IntArrayRef sizes) {
  const at::Tensor indices = sparse_parts(grad).indices();
  return {indices.const_data_ptr<int64_t>(),
          indices.stride(0),
          indices.stride(1),
          indices.size(0),
          indices.size(1),
          sizes.data()};
}

}  // namespace

void Call::check_partial(const PartialList& partial) const {
  const auto& [name, tensors] = partial.list;
  for (size_t n = 0; n < tensors.size(); ++n) {
    const at::Tensor& tensor = tensors[n];
    const auto i = static_cast<int64_t>(n);
    if (!tensor.defined()) continue;
    if (tensor.layout() != at::kStrided) refuse(name, i, text("has layout ", tensor.layout(), ", expected Strided"));
    if (tensor.device() != device) refuse(name, i, text("is on ", tensor.device(), ", expected ", device));
    if (!storage_of(tensor.scalar_type()) || tensor.is_complex())
      refuse(name, i, text("has dtype ", tensor.scalar_type(), ", expected a real floating point type"));
    if (tensor.scalar_type() == at::kDouble && !spec_.controls.companions.empty()) refuse(name, i, kNoDouble);
    auto expected = rule_.lists[kParam].tensors[n].sizes().vec();
    if (partial.reduced != 0) expected[expected.size() - partial.reduced] = 1;
    if (!tensor.sizes().equals(expected))
      refuse(name, i, text("has shape ", tensor.sizes(), ", expected ", at::IntArrayRef(expected)));
    check_writable(name, i, tensor);
  }
}

void Call::require_real() const {
  const auto params = rule_.lists[kParam].tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].is_complex())
      refuse("params", static_cast<int64_t>(i), text("has dtype ", params[i].scalar_type(), ", expected a real type"));
  }
}

void Call::require_real_matrices() const {
  const auto params = rule_.lists[kParam].tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].dim() != 2 || params[i].is_complex()) {
      refuse("params", static_cast<int64_t>(i),
             text("has dtype ", params[i].scalar_type(), " and shape ", params[i].sizes(), ", expected a real matrix"));
    }
  }
}

void Call::check_lengths() const {
  const auto& first = rule_.lists[kParam];
  const size_t n = first.tensors.size();
  const auto check = [&](const char* name, size_t found, bool may_be_empty) {
    TORCH_CHECK_VALUE(found == n || (may_be_empty && found == 0), "optim_ext::", spec_.op, ": ", first.name, " has ", n,
                      " tensors but ", name, " has ", found, "; the lists must be equally long");
  };
  for (int k = 0; k < rule_.count; ++k) check(rule_.lists[k].name, rule_.lists[k].tensors.size(), !rule_.is_used(k));
  if (spec_.state_steps) check("state_steps", spec_.state_steps->size(), false);
  for (const List& list : spec_.scalars) check(list.name, list.tensors.size(), false);
  check("averages", spec_.controls.averages.size(), true);
  const size_t companions = spec_.controls.companions.size();
  TORCH_CHECK_VALUE(spec_.takes_companions || companions == 0, "optim_ext::", spec_.op,
                    " keeps parameters and state as they are: it takes no companions");
  TORCH_CHECK_VALUE(n == 0 ? companions == 0 : companions % n == 0 && companions / n <= std::size(kCompanions),
                    "optim_ext::", spec_.op, ": ", first.name, " has ", n, " tensors but companions has ", companions,
                    "; there must be as many of each kind");
}

void Call::make_bundle(const Operands& operands, int64_t i, Bundle& bundle) {
  const at::Tensor& leader = operands.lists[operands.leader].tensors[i];
  if (!leader.defined()) refuse(operands.lists[operands.leader].name, i, "is undefined");
  bool flat = leader.is_non_overlapping_and_dense();
  const at::Tensor* rows = nullptr;  // a sparse gradient
  for (int k = 0; k < operands.count; ++k) {
    if (!operands.is_used(k)) continue;
    const at::Tensor& given = operands.lists[k].tensors[i];
    const char* const name = operands.lists[k].name;
    if (!given.defined()) refuse(name, i, "is undefined");
    const bool sparse = &operands == &rule_ && k == kGrad && spec_.takes_sparse && given.is_sparse();
    const at::Tensor& tensor = sparse ? held_.emplace_back(sparse_gradient(i)) : given;
    if (sparse) rows = &tensor;
    if (tensor.layout() != at::kStrided && !sparse)
      refuse(name, i, text("has layout ", tensor.layout(), ", expected ", at::kStrided));
    if (tensor.device() != device) refuse(name, i, text("is on ", tensor.device(), ", expected ", device));
    const bool is_q8 = tensor.scalar_type() == at::kByte && operands.may_be_q8(k) && !spec_.controls.companions.empty();
    const auto storage = is_q8 ? std::optional(Storage::q8) : storage_of(tensor.scalar_type());
    if (!storage) {
      refuse(name, i,
             text("has dtype ", tensor.scalar_type(),
                  ", expected a floating point or complex type (Float, Double, BFloat16, Half, ComplexFloat, "
                  "ComplexDouble)"));
    }
    if (k != operands.leader) {
      if (tensor.is_complex() != leader.is_complex()) {
        refuse(name, i,
               text("has dtype ", tensor.scalar_type(), ", expected ",
                    leader.is_complex() ? "a complex type as its parameter's, " : "a real type as its parameter's, ",
                    leader.scalar_type()));
      }
      if (!tensor.sizes().equals(leader.sizes()))
        refuse(name, i, text("has shape ", tensor.sizes(), ", expected its parameter's shape ", leader.sizes()));
      flat &= sparse || (tensor.is_contiguous() && leader.is_contiguous()) || same_strides(tensor, leader);
    }
    if (tensor.is_conj() || tensor.is_neg())
      refuse(name, i, "is a lazy conjugate or negative view; call resolve_conj() and resolve_neg() on it");
    if (operands.is_updated(k)) check_writable(name, i, tensor);
    bundle.storage[k] = *storage;
    bundle.in_double |= *storage == Storage::f64;
    if (sparse) continue;
    if (tensor.has_storage() && !tensor.unsafeGetTensorImpl()->storage_initialized())
      refuse(name, i, text("has shape ", tensor.sizes(), " but no memory: its storage was resized to 0"));
    bundle.data[k] = operands.is_written(k) ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    if (k == kGrad && &operands == &rule_) note_grad(memory_of(tensor));
  }
  bundle.numel = leader.numel() * (leader.is_complex() ? 2 : 1);
  if (rows) {
    use_rows(i, *rows, bundle);
  } else if (!flat && leader.numel() > 1) {
    bundle.layout = make_layout(operands, i);
  }
}

void Call::check_writable(const char* list, int64_t i, const at::Tensor& tensor) const {
  if (shares_elements(tensor))
    refuse(list, i, "has elements that share memory (an expanded tensor?), so it cannot be updated in place");
  if (tensor.is_inference() && !c10::InferenceMode::is_enabled())
    refuse(list, i, "is an inference tensor; it can only be updated inside torch.inference_mode()");
}

// A sparse gradient whose indices are known to lie in the parameter. On a GPU each of them is there once.
at::Tensor Call::sparse_gradient(int64_t i) {
  const at::Tensor &grad = spec_.operands.begin()[kGrad].tensors[i], &param = spec_.operands.begin()[kParam].tensors[i];
  if (grad.device() != device) refuse("grads", i, text("is on ", grad.device(), ", expected ", device));
  if (!grad.sizes().equals(param.sizes()))
    refuse("grads", i, text("has shape ", grad.sizes(), ", expected its parameter's shape ", param.sizes()));
  if (grad.is_complex()) refuse("grads", i, "is sparse and complex; make it dense");
  if (spec_.controls.grad_scale) refuse("grads", i, "is sparse, so it cannot be unscaled in place");
  std::optional<SparseIndices::Outside> outside;
  if (grad.is_cpu()) {
    outside = indices_of(grad, param.sizes()).outside();
  } else {
    const at::Tensor indices = grad._indices();
    for (int64_t d = 0; d < grad.sparse_dim() && indices.size(1) > 0 && !outside; ++d) {
      const auto least = indices.select(0, d).min().item<int64_t>(), most = indices.select(0, d).max().item<int64_t>();
      if (least < 0 || most >= param.size(d)) outside = {d, least < 0 ? least : most};
    }
  }
  if (outside) {
    refuse("grads", i,
           text("has index ", outside->index, " in dimension ", outside->dim, " of its parameter's shape ",
                param.sizes()));
  }
  if (grad.is_cpu()) return grad;
  // Beside what is kept more exactly, rows that are there twice are summed as the CPU sums them where it reads them.
  const bool in_float = !spec_.controls.companions.empty() && grad.element_size() < 4 && !grad.is_coalesced();
  return (in_float ? grad.to(at::kFloat) : grad).coalesce();
}

// A row is what one index selects. Rows lie back to back in the gradient's values, and at the indexed places of the
// parameter and its state.
void Call::use_rows(int64_t i, const at::Tensor& grad, Bundle& bundle) {
  const at::Tensor& param = rule_.lists[kParam].tensors[i];
  for (int k = 0; k < rule_.count; ++k) {
    if (k != kGrad && rule_.is_used(k) && !rule_.lists[k].tensors[i].is_contiguous())
      refuse(rule_.lists[k].name, i, "is not contiguous, which a sparse gradient asks for");
  }
  const at::Tensor& values = held_.emplace_back(sparse_parts(grad).values().contiguous());
  bundle.data[kGrad] = const_cast<void*>(values.const_data_ptr());
  bundle.numel = values.numel();
  if (bundle.numel == 0) return;
  Layout& layout = layouts_.emplace_back();
  if (grad.is_cpu()) {
    const SparseRows& rows = rows_.emplace_back(indices_of(grad, param.sizes()), sparse_parts(grad).coalesced());
    layout.rows = rows.rows;
    layout.firsts = rows.firsts;
    layout.sources = rows.sources;
    layout.sizes[0] = rows.count;
  } else {
    const at::Tensor indices = grad._indices();
    at::Tensor rows = at::zeros({indices.size(1)}, indices.options());
    for (int64_t d = 0; d < grad.sparse_dim(); ++d) rows = rows.mul(param.size(d)).add(indices.select(0, d));
    layout.rows = held_.emplace_back(rows.contiguous()).const_data_ptr<int64_t>();
    layout.sizes[0] = rows.numel();
  }
  layout.ndim = 2;
  layout.sizes[1] = values.numel() / values.size(0);
  bundle.numel = layout.sizes[0] * layout.sizes[1];
  for (int k = 0; k < rule_.count; ++k) {
    layout.strides[k][0] = layout.sizes[1];
    layout.strides[k][1] = 1;
  }
  bundle.layout = &layout;
}

// The walk order is the leader's own memory order, so that a dense parameter is still read front to back.
const Layout* Call::make_layout(const Operands& operands, int64_t i) {
  const at::Tensor& leader = operands.lists[operands.leader].tensors[i];
  const int64_t width = leader.is_complex() ? 2 : 1;
  memory::Walk walk{{}, operands.used};
  for (int64_t d = 0; d < leader.dim(); ++d) {
    memory::WalkDim& dim = walk.dims.emplace_back(memory::WalkDim{leader.size(d), {}});
    for (int k = 0; k < operands.count; ++k) {
      if (operands.is_used(k)) dim.strides[k] = operands.lists[k].tensors[i].stride(d) * width;
    }
  }
  // An average follows the same walk, and companions lie in the parameter's own.
  const bool any_order = spec_.any_order && spec_.controls.averages.empty() && spec_.controls.companions.empty();
  memory::order(walk, any_order ? memory::most_common(walk, operands.leader) : operands.leader);
  if (width == 2) walk.dims.emplace_back(memory::WalkDim{2, {}}).strides.fill(1);
  memory::merge(walk);
  if (spec_.controls.averages.empty() && spec_.controls.companions.empty()) memory::lengthen_runs(walk);
  if (any_order) memory::make_squares(walk);
  Layout& layout = layouts_.emplace_back();
  const std::vector<int64_t> outer = memory::list_outer(walk, kMaxDims);
  if (!outer.empty()) {
    at::Tensor places = at::empty({static_cast<int64_t>(outer.size())}, at::kLong);
    std::copy(outer.begin(), outer.end(), places.mutable_data_ptr<int64_t>());
    layout.outer = held_.emplace_back(places.to(device)).const_data_ptr<int64_t>();
  }
  layout.ndim = static_cast<int32_t>(walk.dims.size());
  for (size_t d = 0; d < walk.dims.size(); ++d) {
    layout.sizes[d] = walk.dims[d].size;
    for (int k = 0; k < operands.count; ++k) layout.strides[k][d] = walk.dims[d].strides[k];
  }
  return &layout;
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
    if (!is_count(count)) refuse("state_steps", i, text("is ", count, ", expected a count of steps"));
    bundle.step = count + 1.0;  // as advance() will find it, but where several parameters share a count
  } else {
    bundle.device_step = step.mutable_data_ptr();
    if (!spec_.counts) bundle.step = 1.0;
    steps_on_device |= spec_.counts;
  }
}

void Call::add_scalar(int64_t i, const List& list, const Bundle& bundle, ScalarState& scalar) {
  const at::Tensor& tensor = list.tensors[i];
  if (!tensor.defined()) refuse(list.name, i, "is undefined");
  if (tensor.numel() != 1 || tensor.layout() != at::kStrided)
    refuse(list.name, i, text("has shape ", tensor.sizes(), ", expected a tensor with one element"));
  const auto storage = storage_of(tensor.scalar_type());
  if (!storage || tensor.is_complex())
    refuse(list.name, i, text("has dtype ", tensor.scalar_type(), ", expected a real floating point type"));
  if (!tensor.is_cpu() && tensor.device() != device)
    refuse(list.name, i, text("is on ", tensor.device(), ", expected cpu or ", device));
  scalar.storage = *storage;
  if (!tensor.is_cpu()) {
    scalar.device = tensor.mutable_data_ptr();
    return;
  }
  if (bundle.device_step)
    refuse(list.name, i, text("is on cpu, but the step count it depends on is on ", device, "; move it there"));
  scalar.value = load_element<double>(tensor.const_data_ptr(), *storage, 0);
  host_scalars_ = true;
}

}  // namespace optim_ext::ops
