#include "call.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>
#include <sstream>

#include "../kernels/convert.h"
#include "../memory/overlap.h"
#include "../memory/strided.h"
#include "parallel.h"
#include "turns.h"

namespace optim_ext::ops {

namespace {

using memory::Access, memory::Extent, memory::SparseIndices, memory::SparseRows;

static_assert(memory::kMostArrays == kMaxOperands);

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

constexpr int kParam = 0, kGrad = 1;
constexpr int64_t kAhead = 8;  // tensors
constexpr const char* kOverlaps =
    "overlaps in memory with another tensor this step writes; each needs memory of its own";
constexpr const char* kReadsLate =
    "overlaps in memory with what the step of an earlier parameter writes (torch's modes disagree on which value it "
    "has "
    "then); give it memory of its own";

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

Extent extent_of(const at::Tensor& tensor) {
  const void* const data = tensor.const_data_ptr();
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  if (tensor.is_non_overlapping_and_dense()) return memory::dense_extent(data, tensor.numel() * bytes);
  return memory::strided_extent(data, bytes, tensor.sizes(), tensor.strides());
}

// The same for operand `k` of a bundle, which already knows where dense memory lies.
Extent extent_of(const Bundle& bundle, int k, const at::Tensor& tensor) {
  if (bundle.layout != nullptr) return extent_of(tensor);
  return memory::dense_extent(bundle.data[k], bundle.numel * bytes_of(bundle.storage[k]));
}

// Whether no order of its elements can make a tensor's update right.
bool shares_elements(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return false;
  int64_t budget = memory::kPairBudget;
  return at::has_internal_overlap(tensor) == at::MemOverlap::Yes ||
         memory::overlap_within(extent_of(tensor), budget) == memory::Overlap::some;
}

// Where a tensor's memory was allocated. Views of one allocation have that in common.
const void* memory_of(const at::Tensor& tensor) { return tensor.storage().data(); }

}  // namespace

struct KnownCall {
  std::vector<Access> writes, reads;  // reads: of memory that is written, too
  Addresses memory;                   // that what is written was allocated in
  std::vector<int32_t> turn_of_member;
};

namespace {
thread_local KnownCalls kept_by_nobody;
thread_local KnownCalls* current_calls = nullptr;

KnownCalls& known_calls() { return current_calls ? *current_calls : kept_by_nobody; }
}  // namespace

RemembersCalls::RemembersCalls(KnownCalls& calls) : before_(current_calls) { current_calls = &calls; }
RemembersCalls::~RemembersCalls() { current_calls = before_; }

std::array<KnownCalls::Known, KnownCalls::kMost> KnownCalls::all() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

void KnownCalls::remember(Known call, const KnownCall* outdated) {
  const std::lock_guard lock(mutex_);
  for (Known& known : calls_) {
    if (outdated != nullptr && known.get() == outdated) return known.swap(call);
  }
  calls_[oldest_++ % kMost].swap(call);
}

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

BadHyper::BadHyper(const std::string& problem, bool divides)
    : c10::ValueError(problem, c10::Backtrace()), divides(divides) {}

std::string hyper_name(const char* key, int index) { return index < 0 ? key : text(key, "[", index, "]"); }

void Call::refuse(const char* list, int64_t index, const std::string& problem) const {
  throw BadInput(spec_.common.op, list, index, problem);
}

bool Prepared::fits(const CallSpec& spec, unsigned used_here, unsigned updates_here) const {
  return op == spec.common.op && used == used_here && updates == updates_here && !spec.common.grad_scale &&
         spec.common.averages.empty();
}

namespace {
thread_local Handover* current_handover = nullptr;
}  // namespace

Handover::Handover(Kind kind, Prepared& prepared) : kind(kind), prepared(prepared), before_(current_handover) {
  current_handover = this;
}
Handover::~Handover() { current_handover = before_; }
Handover* Handover::current() { return current_handover; }

Call::Call(const CallSpec& spec, int operands, unsigned used, unsigned updates, Handover* handover)
    : handover_(handover),
      spec_(spec),
      rule_{spec.operands.begin(),
            operands,
            spec.leader,
            used,
            updates,
            updates | (spec.common.grad_scale ? 1u << kGrad : 0u)},
      averaging_lists_{{"averages", spec.common.averages}, spec.operands.begin()[kParam]},
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
  if (rule_.written != 0 && !OverlapsChecked::active()) known_ = known_calls().all();
  make_bundles();
  read_pass();
  if (pass.unscale || pass.device_grad_scale) {
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
    found.op = spec.common.op;
    found.used = used;
    found.updates = updates;
    found.bundles = bundles;
  }
}

// Whether the bundles say all there is to say of the tensors, for as long as these stay what they are.
bool Call::is_plain() const {
  return device.is_cpu() && !spec_.common.grad_scale && averages_.empty() && spec_.scalars.size() == 0 &&
         spec_.partial.size() == 0 && spec_.leader == kParam && spec_.counts && !OverlapsChecked::active() &&
         std::all_of(bundles.begin(), bundles.end(),
                     [](const Bundle& bundle) { return bundle.layout == nullptr && bundle.numel > 0; });
}

bool Call::leave(const RuleProgram& program, const void* rule) {
  if (!loan_) return false;
  handover_->sweep.emplace(program, rule, handover_->prepared.bundles, pass);
  return true;
}

// Most tensors are found to be as usual, on all threads at once. The others, and what is wrong with them, are looked
// into in their order.
void Call::make_bundles() {
  const auto count = static_cast<int64_t>(rule_.lists[kParam].tensors.size());
  const auto make_all = [&](const auto& make, const auto& find_usual, const auto& fetch, const auto& make_usual,
                            const auto& finish) {
    make(0);
    if (expected_ == nullptr) expect_writes();
    std::vector<uint8_t> made(count, 0);
    made[0] = 1;
    if (count > 1 && find_usual()) {
      over_tensors(device, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) {
          if (i + kAhead < end) fetch(i + kAhead);
          made[i] = make_usual(i);
        }
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      if (!made[i]) make(i);
      finish(i);
    }
  };

  Usual usual[kMaxOperands], usual_step;
  const List steps{"state_steps", spec_.state_steps.value_or(at::TensorList())};
  const bool has_steps = spec_.state_steps.has_value();
  bundles.resize(count);
  make_all(
      [&](int64_t i) {
        make_bundle(rule_, i, bundles[i] = Bundle{});
        if (has_steps) add_step(i, bundles[i]);
      },
      [&] { return find_usual(rule_, usual) && (!has_steps || find_usual({&steps, 1, 0, 1, 0, 0}, &usual_step)); },
      [&](int64_t i) { fetch(rule_, i); },
      [&](int64_t i) {
        return make_usual_bundle(rule_, usual, i, bundles[i]) &&
               (!has_steps || add_usual_step(steps.tensors[i], usual_step, bundles[i]));
      },
      [&](int64_t i) {
        for (size_t k = 0; k < spec_.scalars.size(); ++k)
          add_scalar(i, spec_.scalars.begin()[k], bundles[i], bundles[i].scalars[k]);
      });
  for (const PartialList& partial : spec_.partial) check_partial(partial);

  if (spec_.common.averages.empty()) return;
  Usual usual_pair[rules::Average::kOperands];
  averages_.resize(count);
  make_all(
      [&](int64_t i) {
        if (bundles[i].layout && bundles[i].layout->rows)
          refuse("averages", i, "cannot follow within the step where the gradient is sparse");
        make_bundle(averaging_, i, averages_[i] = Bundle{});
      },
      [&] { return find_usual(averaging_, usual_pair); }, [&](int64_t i) { fetch(averaging_, i); },
      [&](int64_t i) {
        return bundles[i].layout == nullptr && make_usual_bundle(averaging_, usual_pair, i, averages_[i]);
      },
      [&](int64_t i) { bundles[i].average = &averages_[i]; });
}

// False where the first tensors, which have been checked, are of a kind that is always looked into.
bool Call::find_usual(const Operands& operands, Usual* usual) const {
  for (int k = 0; k < operands.count; ++k) {
    if (!operands.is_used(k)) continue;
    const at::Tensor& first = operands.lists[k].tensors[0];
    if (first.layout() != at::kStrided || !first.has_storage()) return false;
    usual[k] = {first.key_set(), first.dtype(), *storage_of(first.scalar_type()), first.is_complex() ? 2 : 1,
                first.storage().data_ptr().get_deleter()};
  }
  return true;
}

// Asks for what make_usual_bundle() will look at.
void Call::fetch(const Operands& operands, int64_t i) const {
  for (int k = 0; k < operands.count; ++k) {
    if (!operands.is_used(k)) continue;
    const char* const tensor = reinterpret_cast<const char*>(operands.lists[k].tensors[i].unsafeGetTensorImpl());
    for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(tensor + at);
  }
}

// make_bundle() where there is nothing to say: every tensor is as usual and contiguous. False where it is not so.
__attribute__((flatten)) bool Call::make_usual_bundle(const Operands& operands, const Usual* usual, int64_t i,
                                                      Bundle& bundle) const {
  const c10::TensorImpl* const leader = operands.lists[operands.leader].tensors[i].unsafeGetTensorImpl();
  if (leader->key_set() != usual[operands.leader].keys) return false;
  const c10::IntArrayRef sizes = leader->sizes();
  const int64_t numel = leader->numel();
  if (numel == 0) return false;
  bundle = Bundle{};
  for (int k = 0; k < operands.count; ++k) {
    if (!operands.is_used(k)) continue;
    const auto& [keys, dtype, storage, width, deleter] = usual[k];
    const c10::TensorImpl* const tensor = operands.lists[k].tensors[i].unsafeGetTensorImpl();
    if (tensor->key_set() != keys || tensor->dtype() != dtype || tensor->device() != device || !tensor->is_contiguous())
      return false;
    const c10::IntArrayRef own = tensor->sizes();
    bool same = own.size() == sizes.size();
    for (size_t d = 0; same && d < sizes.size(); ++d) same = own[d] == sizes[d];
    c10::StorageImpl* const memory = tensor->unsafe_storage().unsafeGetStorageImpl();
    if (!same || memory == nullptr || memory->data_ptr().get_deleter() != deleter) return false;
    const void* const data = operands.is_written(k) ? memory->mutable_data() : memory->data();
    if (data == nullptr) return false;  // its memory was taken away
    if (k == kGrad && &operands == &rule_) note_grad(memory->data());
    bundle.data[k] = static_cast<char*>(const_cast<void*>(data)) + tensor->storage_offset() * width * bytes_of(storage);
    bundle.storage[k] = storage;
    bundle.in_double |= storage == Storage::f64;
  }
  bundle.numel = numel * usual[operands.leader].width;
  return true;
}

// add_step() in the same way, for counts on the host.
__attribute__((flatten)) bool Call::add_usual_step(const at::Tensor& tensor, const Usual& usual, Bundle& bundle) const {
  const c10::TensorImpl* const step = tensor.unsafeGetTensorImpl();
  if (step->key_set() != usual.keys || step->dtype() != usual.dtype || !step->is_cpu() || step->numel() != 1)
    return false;
  const c10::StorageImpl* const memory = step->unsafe_storage().unsafeGetStorageImpl();
  if (memory == nullptr || memory->data() == nullptr) return false;
  const void* const data = static_cast<const char*>(memory->data()) + step->storage_offset() * bytes_of(usual.storage);
  const double count = host_value(data, usual.storage);
  if (!is_count(count)) return false;
  bundle.step_storage = usual.storage;
  bundle.step = count + 1.0;
  return true;
}

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
    TORCH_CHECK_VALUE(found == n || (may_be_empty && found == 0), "optim_ext::", spec_.common.op, ": ", first.name,
                      " has ", n, " tensors but ", name, " has ", found, "; the lists must be equally long");
  };
  for (int k = 0; k < rule_.count; ++k) check(rule_.lists[k].name, rule_.lists[k].tensors.size(), !rule_.is_used(k));
  if (spec_.state_steps) check("state_steps", spec_.state_steps->size(), false);
  for (const List& list : spec_.scalars) check(list.name, list.tensors.size(), false);
  check("averages", spec_.common.averages.size(), true);
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
    const auto storage = storage_of(tensor.scalar_type());
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
  if (spec_.common.grad_scale) refuse("grads", i, "is sparse, so it cannot be unscaled in place");
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
  return grad.is_cpu() ? grad : grad.coalesce();
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
  const bool any_order = spec_.any_order && spec_.common.averages.empty();  // an average follows the same walk
  memory::order(walk, any_order ? memory::most_common(walk, operands.leader) : operands.leader);
  if (width == 2) walk.dims.push_back({2, {1, 1, 1, 1, 1, 1}});
  memory::merge(walk);
  if (spec_.common.averages.empty()) memory::lengthen_runs(walk);
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

void Call::read_average_weight() {
  if (averages_.empty()) return;
  const auto& weight = spec_.common.average_weight;
  const bool fits = weight && weight->defined() && weight->numel() == 1 && weight->layout() == at::kStrided &&
                    (weight->scalar_type() == at::kFloat || weight->scalar_type() == at::kDouble) &&
                    (weight->is_cpu() || weight->device() == device);
  TORCH_CHECK_VALUE(fits, "optim_ext::", spec_.common.op,
                    ": with averages, average_weight must be one Float or Double element on cpu or ", device);
  pass.average_weight_storage = *storage_of(weight->scalar_type());
  if (!weight->is_cpu()) {
    pass.device_average_weight = weight->const_data_ptr();
    return;
  }
  pass.average_weight = host_value(weight->const_data_ptr(), pass.average_weight_storage);
  check_average_weight(spec_.common.op, "average_weight", pass.average_weight);
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
    return scalar_data(spec_.common.op, name, value, device, dtypes);
  };
  const auto* const scale = static_cast<const float*>(given(spec_.common.grad_scale, "grad_scale", {at::kFloat}));
  const auto* const found = static_cast<const float*>(given(spec_.common.found_inf, "found_inf", {at::kFloat}));
  const void* const factor = given(spec_.common.grad_factor, "grad_factor", {at::kFloat, at::kDouble});
  read_average_weight();
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

// Lists are numbered: operands, averages, scalars, partial ones.
const char* Call::name_of_list(int32_t list) const {
  if (list < rule_.count) return rule_.lists[list].name;
  if (list == rule_.count) return averaging_lists_[kParam].name;
  const size_t scalar = list - rule_.count - 1, partial = scalar - spec_.scalars.size();
  return scalar < spec_.scalars.size() ? spec_.scalars.begin()[scalar].name : spec_.partial.begin()[partial].list.name;
}

// Calls visit(access, tensor) for the memory of all tensors that are written, until it returns false.
template <class Visit>
bool Call::visit_written(const Visit& visit) const {
  for (size_t i = 0; i < bundles.size(); ++i) {
    const auto member = static_cast<int32_t>(i);
    for (int k = 0; bundles[i].numel != 0 && k < rule_.count; ++k) {
      if (!rule_.is_written(k)) continue;
      const at::Tensor& tensor = rule_.lists[k].tensors[i];
      if (!visit(Access{extent_of(bundles[i], k, tensor), member, k}, tensor)) return false;
    }
    int32_t list = rule_.count;
    if (bundles[i].numel != 0 && bundles[i].average) {
      const at::Tensor& tensor = averaging_lists_[kParam].tensors[i];
      if (!visit(Access{extent_of(averages_[i], kParam, tensor), member, list}, tensor)) return false;
    }
    for (const List& scalars : spec_.scalars) {
      const at::Tensor& tensor = scalars.tensors[i];
      if (!visit(Access{extent_of(tensor), member, ++list}, tensor)) return false;
    }
    for (const PartialList& partial : spec_.partial) {
      const at::Tensor& tensor = partial.list.tensors[i];
      ++list;
      if (tensor.defined() && tensor.numel() != 0 && !visit(Access{extent_of(tensor), member, list}, tensor))
        return false;
    }
  }
  return true;
}

// Gradients in memory that is written, too: they are other tensors at every step, so only these are looked at closely.
template <class Memory>
std::vector<Access> Call::reads_from(const Memory& written) const {
  std::vector<Access> reads;
  if (!rule_.reads_grads()) return reads;
  for (size_t i = 0; i < bundles.size(); ++i) {
    const at::Tensor& tensor = rule_.lists[kGrad].tensors[i];
    if (bundles[i].numel == 0 || tensor.layout() != at::kStrided || !written.contains(memory_of(tensor))) continue;
    const at::Tensor& param = rule_.lists[kParam].tensors[i];
    // A gradient may be its own parameter, element by element.
    const bool in_place = rule_.is_written(kParam) && bundles[i].data[kGrad] == bundles[i].data[kParam] &&
                          bundles[i].storage[kGrad] == bundles[i].storage[kParam] && same_strides(tensor, param);
    reads.push_back({extent_of(bundles[i], kGrad, tensor), static_cast<int32_t>(i), kGrad, in_place});
  }
  return reads;
}

// The sweep runs in parallel over all members, so their memory must be disjoint. Looking at thousands of addresses at
// every step would cost more than a small model's update, so what was found is remembered with the call it is true of.
void Call::check_overlap() const {
  KnownCalls::Known call;
  for (const KnownCalls::Known& known : known_) {
    if (known == nullptr) continue;
    auto at = known->writes.begin();
    const auto end = known->writes.end();
    const auto is_next = [&](const Access& access, const at::Tensor&) { return at != end && *at++ == access; };
    if (!visit_written(is_next) || at != end) continue;
    const bool reads_none = known.get() == expected_ && !grads_meet_writes_;
    std::vector<Access> reads = reads_none ? std::vector<Access>() : reads_from(known->memory);
    if (reads == known->reads) {
      call = known;
    } else {
      call = look_at_overlaps({known->writes, std::move(reads), known->memory, {}});
      known_calls().remember(call, known.get());
    }
    break;
  }
  if (call == nullptr) {
    std::vector<Access> writes;
    std::vector<const void*> memory;
    visit_written([&](Access access, const at::Tensor& tensor) {
      writes.push_back(std::move(access));
      memory.push_back(memory_of(tensor));
      return true;
    });
    const Addresses addresses(memory);
    call = look_at_overlaps({std::move(writes), reads_from(addresses), addresses, {}});
    known_calls().remember(call, nullptr);
  }
  if (!call->turn_of_member.empty()) take_turns(call->turn_of_member);
}

// Refuses what no order of the members makes right, and says in which order the others go.
KnownCalls::Known Call::look_at_overlaps(KnownCall call) const {
  memory::Turns turns = memory::turns_of(call.writes, call.reads, static_cast<int64_t>(bundles.size()));
  const auto refuse_access = [&](const Access& access, const char* problem) {
    refuse(name_of_list(access.list), access.member, problem);
  };
  if (turns.bad_write >= 0) refuse_access(call.writes[turns.bad_write], kOverlaps);
  if (turns.bad_read >= 0) refuse_access(call.reads[turns.bad_read], kOverlaps);
  if (turns.late_read >= 0) refuse_access(call.reads[turns.late_read], kReadsLate);
  call.turn_of_member = std::move(turns.of_member);
  return std::make_shared<const KnownCall>(std::move(call));
}

void Call::take_turns(const std::vector<int32_t>& turn_of_member) const {
  MembersInTurn turns(*std::max_element(turn_of_member.begin(), turn_of_member.end()) + 1);
  for (size_t i = 0; i < turn_of_member.size(); ++i) turns[turn_of_member[i]].push_back(static_cast<int64_t>(i));
  const int64_t first_to_wait = turns[1][0];
  throw InTurn(spec_.common.op, rule_.lists[kParam].name, first_to_wait, kOverlaps, std::move(turns));
}

// What this call is going to write, most likely: so the threads that look at the tensors can also see to it that no
// gradient lies in that memory.
void Call::expect_writes() {
  if (!rule_.reads_grads() || bundles[0].numel == 0) return;
  const auto first = reinterpret_cast<uintptr_t>(bundles[0].data[std::countr_zero(rule_.written)]);
  for (const KnownCalls::Known& known : known_) {
    if (known && !known->writes.empty() && known->writes.front().extent.begin == first) expected_ = known.get();
  }
  const at::Tensor& grad = rule_.lists[kGrad].tensors[0];  // whose bundle was made before this was known
  if (grad.layout() == at::kStrided) note_grad(memory_of(grad));
}

void Call::note_grad(const void* memory) const {
  if (expected_ && expected_->memory.contains(memory)) grads_meet_writes_ = true;
}

void Call::set(std::initializer_list<Hyper> hypers, const void* rule, size_t rule_size) {
  for (const Hyper& hyper : hypers) {
    const auto offset = reinterpret_cast<const char*>(hyper.slot) - static_cast<const char*>(rule);
    TORCH_INTERNAL_ASSERT(offset >= 0 && offset + sizeof(double) <= rule_size);
    double value = hyper.value;
    if (hyper.tensor) {
      const at::Tensor& tensor = *hyper.tensor;
      TORCH_CHECK_VALUE(tensor.defined() && tensor.numel() == 1 && !tensor.is_complex(), "optim_ext::", spec_.common.op,
                        ": ", hyper_name(hyper.key, hyper.index),
                        " must be a number or a real tensor with one element");
      // Scalar state on the host that depends on this value makes the host wait for it, as torch does.
      if (!tensor.is_cpu() && tensor.device() == device && !(host_scalars_ && hyper.in_scalars)) {
        const auto storage = storage_of(tensor.scalar_type());
        TORCH_CHECK_VALUE(storage, "optim_ext::", spec_.common.op, ": ", hyper_name(hyper.key, hyper.index),
                          " has dtype ", tensor.scalar_type(), ", expected a floating point type");
        device_hypers.push_back({offset, tensor.const_data_ptr(), *storage});
        continue;
      }
      value = tensor.item().toDouble();
    }
    if (std::isnan(value))
      throw BadHyper(text("optim_ext::", spec_.common.op, ": ", hyper_name(hyper.key, hyper.index), " is NaN"), false);
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
  if (!program.stores_scalars) return;
  alignas(double) unsigned char ready[kMaxRuleBytes];
  for (size_t i = 0; i < bundles.size(); ++i) {
    rules::Scalar after[kMaxScalars] = {};
    if (host_scalars_) make_ready(program, rule, bundles[i], ready, after);
    for (int k = 0; k < program.scalars; ++k) store_scalar(static_cast<int64_t>(i), k, after[k].value);
  }
}

void make_ready(const RuleProgram& program, const void* rule, const Bundle& bundle, void* ready, rules::Scalar* after) {
  rules::Scalar scalars[kMaxScalars];
  for (int k = 0; k < program.scalars; ++k) {
    scalars[k] = {bundle.scalars[k].value, bundle.scalars[k].storage == Storage::f64};
  }
  program.at_step(rule, bundle.step, scalars, ready);
  if (after) std::copy_n(scalars, program.scalars, after);
}

// In order, as a count may serve several parameters.
void Call::advance(int64_t i) {
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

void Work::begin_second_rule() {
  pass.unscale = false;
  pass.device_grad_scale = nullptr;
  steps_on_device = false;
}

void Work::use_scalars(int k, const double* values) {
  for (Bundle& bundle : bundles) {
    ScalarState& scalar = bundle.scalars[k];
    scalar = {device.is_cpu() ? *values : 0.0, device.is_cpu() ? nullptr : const_cast<double*>(values), Storage::f64};
    ++values;
  }
}

OneOperand::OneOperand(const Work& call, int operand) {
  device = call.device;
  for (const Bundle& from : call.bundles) {
    Bundle& bundle = bundles.emplace_back(Bundle{});
    bundle.data[0] = from.data[operand];
    bundle.storage[0] = from.storage[operand];
    bundle.numel = from.numel;
    if (!from.layout) continue;
    Layout& layout = layouts_.emplace_back(*from.layout);
    std::copy_n(from.layout->strides[operand], kMaxDims, layout.strides[0]);
    if (layout.outer) layout.outer += operand * layout.sizes[0];
    bundle.layout = &layout;
  }
}

void check_average_weight(const char* op, const char* name, double weight) {
  TORCH_CHECK_VALUE(weight >= 0.0 && weight <= 1.0, "optim_ext::", op, ": ", name, " is ", weight,
                    ", expected a number from 0 to 1");
}

CheckOnly::CheckOnly() { ++check_only_depth; }
CheckOnly::~CheckOnly() { --check_only_depth; }
bool CheckOnly::active() { return check_only_depth > 0; }

}  // namespace optim_ext::ops
