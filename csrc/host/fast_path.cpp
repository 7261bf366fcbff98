#include "fast_path.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <utility>

#include "../call/parallel.h"
#include "../memory/turns.h"
#include "../ops/driver_cpu.h"

namespace optim_ext::ops {

namespace {

constexpr size_t kAhead = 8;                         // tensors of each list
constexpr int64_t kLongestWait = 256, kWorthIt = 4;  // steps

// Of more dimensions TensorImpl keeps sizes elsewhere, one cache miss further.
constexpr size_t kMostDims = 5;

bool is_same_shape(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const c10::IntArrayRef sizes = a.sizes(), other = b.sizes();
  bool same = sizes.size() == other.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] == other[d];
  return same;
}

// Asks for every cache line of an object, wherever in one it begins.
template <class T>
void fetch_whole(const T* object) {
  const char* const at = reinterpret_cast<const char*>(object);
  for (size_t line = 0; line < sizeof(T); line += 64) __builtin_prefetch(at + line);
  __builtin_prefetch(at + sizeof(T) - 1);
}

}  // namespace

// 16 bits for each address, one of which is set.
WrittenMemory::WrittenMemory(const std::vector<const void*>& allocations)
    : all_(allocations), filter_(std::bit_ceil(allocations.size() / 4 + 1)) {
  for (const void* const address : allocations) filter_[bit_of(address) / 64] |= uint64_t{1} << (bit_of(address) % 64);
}

LocalView::Kind LocalView::kind_of(const at::Tensor& tensor, PyObject* object) {
  return {tensor.key_set(),
          tensor.dtype(),
          tensor.storage().data_ptr().get_deleter(),
          object ? Py_TYPE(object) : nullptr,
          *storage_of(tensor.scalar_type()),
          tensor.is_complex() ? 2 : 1};
}

std::optional<LocalView::Seen> LocalView::see(const Kind& kind, const at::Tensor& tensor, PyObject* object) {
  const c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
  if (!tensor.is_contiguous() || tensor.is_inference() || static_cast<size_t>(tensor.dim()) > kMostDims)
    return std::nullopt;
  return Seen{object, tensor.unsafeGetTensorImpl(), storage, storage->data_ptr().get(),
              tensor.storage_offset() * kind.width * bytes_of(kind.storage)};
}

bool LocalView::remember(const StepOp& op, const std::vector<PythonTensors>& lists, Prepared found,
                         const std::unordered_map<PyObject*, size_t>& entries) {
  if (found.op == nullptr || found.bundles.size() != lists[kParams].size()) return false;
  for (size_t k = 0; k < lists.size(); ++k) {
    const rules::List& list = op.lists[k];
    const bool is_steps = list.role == rules::List::Role::steps;
    if (list.role == rules::List::Role::operand && list.place == kGradOperand) continue;
    if (lists[k].size() == 0) continue;
    if (lists[k].size() != found.bundles.size() || !(is_steps || list.role == rules::List::Role::operand)) return false;
    if (is_steps) steps_ = columns_.size();
    columns_.push_back({k, is_steps ? kSteps : list.place, is_steps || ((found.updates >> list.place) & 1u) != 0, {}});
  }
  for (size_t i = 0; i < found.bundles.size(); ++i) {
    const Bundle& bundle = found.bundles[i];
    for (size_t c = 0; c < columns_.size(); ++c) {
      Column& column = columns_[c];
      PyObject* const object = lists[column.list].object(i);
      if (object == nullptr) return false;
      const at::Tensor& tensor = THPVariable_Unpack(object);
      if (!tensor.defined() || !tensor.has_storage() || !storage_of(tensor.scalar_type())) return false;
      const Kind kind = kind_of(tensor, object);
      if (i == 0) column.kind = kind;
      const std::optional<Seen> seen = see(kind, tensor, object);
      if (kind != column.kind || !seen) return false;
      // Threads may have run since the call was looked at.
      const bool is_as_found = column.operand == kSteps ? bundle.step_storage == kind.storage
                                                        : bundle.storage[column.operand] == kind.storage &&
                                                              bundle.data[column.operand] == seen->begin() &&
                                                              bundle.numel == tensor.numel() * kind.width;
      if (!is_as_found ||
          (c > 0 && column.operand != kSteps && !is_same_shape(*seen->tensor, *seen_[i * columns_.size()].tensor)))
        return false;
      seen_.push_back(*seen);
      if (c == kParams) numels_.push_back(tensor.numel());
    }
    PyObject* const param = lists[kParams].object(i);
    const auto entry = entries.find(param);
    entries_.push_back(entry == entries.end() ? kNoEntry : entry->second);
    const at::Tensor& grad = THPVariable_Unpack(param).grad();
    if (!grad.defined() || grad.layout() != at::kStrided || !grad.has_storage() || grad.is_conj() || grad.is_neg() ||
        !storage_of(grad.scalar_type()))
      return false;
    Kind kind = kind_of(grad, nullptr);
    kind.deleter = nullptr;  // it is only read
    if (i == 0) grad_kind_ = kind;
    if (kind != grad_kind_ || bundle.storage[kGradOperand] != kind.storage) return false;
    elements_ += bundle.numel;
  }
  counts_.resize(found.bundles.size());
  prepared_ = std::move(found);
  return true;
}

void LocalView::add_written(std::vector<const void*>& allocations, std::vector<memory::Access>& writes,
                            int32_t member) const {
  for (size_t i = 0; i < size(); ++i) {
    for (size_t c = 0; c < columns_.size(); ++c) {
      const Column& column = columns_[c];
      const Seen& seen = seen_[i * columns_.size() + c];
      if (!column.is_written) continue;
      allocations.push_back(seen.data);
      if (column.operand == kSteps) continue;
      const int64_t bytes = prepared_.bundles[i].numel * bytes_of(column.kind.storage);
      writes.push_back({memory::dense_extent(seen.begin(), bytes), member, column.operand});
    }
  }
}

// By their addresses, which are those of living tensors until the first one is found to have changed. To ask for memory
// that is gone does no harm.
void LocalView::fetch(size_t i, size_t end, const StateItems& state) const {
  const size_t width = columns_.size();
  if (const size_t far = i + 2 * kAhead; far < end && entries_[far] != kNoEntry) state.fetch_entry(entries_[far]);
  if (const size_t next = i + kAhead; next < end) {
    if (entries_[next] != kNoEntry) state.fetch_items(entries_[next]);
    for (size_t c = 0; c < width; ++c) {
      const Seen& seen = seen_[next * width + c];
      __builtin_prefetch(seen.object);
      fetch_whole(seen.tensor);
      fetch_whole(seen.storage);
    }
    if (steps_ != 0) __builtin_prefetch(seen_[next * width + steps_].begin());
  }
}

// The parameter that is there now; null where another object has come to lie at its address.
const c10::TensorImpl* LocalView::param_at(size_t i) const {
  PyObject* const object = seen_[i * columns_.size()].object;
  return Py_TYPE(object) == columns_[kParams].kind.type ? THPVariable_Unpack(object).unsafeGetTensorImpl() : nullptr;
}

__attribute__((flatten)) bool LocalView::is_unchanged(size_t i) const {
  const Seen* const row = &seen_[i * columns_.size()];
  const c10::TensorImpl* param = nullptr;
  for (size_t c = 0; c < columns_.size(); ++c) {
    const Seen& seen = row[c];
    const Kind& kind = columns_[c].kind;
    // Another object may have come to lie at the same address, and another tensor to be behind the same object.
    if (Py_TYPE(seen.object) != kind.type) return false;
    const c10::TensorImpl* const tensor = THPVariable_Unpack(seen.object).unsafeGetTensorImpl();
    if (tensor != seen.tensor || tensor->key_set() != kind.keys || tensor->dtype() != kind.dtype) return false;
    const c10::StorageImpl* const storage = tensor->unsafe_storage().unsafeGetStorageImpl();
    if (storage != seen.storage || storage->data_ptr().get() != seen.data ||
        storage->data_ptr().get_deleter() != kind.deleter ||
        tensor->storage_offset() * kind.width * bytes_of(kind.storage) != seen.offset || !tensor->is_contiguous())
      return false;
    if (c == kParams) {
      if (tensor->numel() != numels_[i]) return false;
      param = tensor;
    } else if (c == steps_) {
      if (tensor->numel() != 1) return false;
    } else if (!is_same_shape(*tensor, *param)) {
      return false;
    }
  }
  return true;
}

double LocalView::count_at(size_t i) const {
  const void* const count = seen_[i * columns_.size() + steps_].begin();
  return columns_[steps_].kind.storage == Storage::f64 ? *static_cast<const double*>(count)
                                                       : *static_cast<const float*>(count);
}

__attribute__((flatten)) bool LocalView::take_grad(size_t i, const WrittenMemory& written) {
  const c10::TensorImpl& param = *seen_[i * columns_.size()].tensor;
  const c10::TensorImpl* const grad = internals::grad_of(param).unsafeGetTensorImpl();
  if (grad->key_set() != grad_kind_.keys || grad->dtype() != grad_kind_.dtype || !grad->is_contiguous() ||
      !is_same_shape(*grad, param))
    return false;
  const c10::StorageImpl* const storage = grad->unsafe_storage().unsafeGetStorageImpl();
  const void* const memory = storage == nullptr ? nullptr : storage->data_ptr().get();
  if (memory == nullptr || written.contains(memory)) return false;
  const int64_t offset = grad->storage_offset() * grad_kind_.width * bytes_of(grad_kind_.storage);
  prepared_.bundles[i].data[kGradOperand] = static_cast<char*>(const_cast<void*>(memory)) + offset;
  return true;
}

bool LocalView::look(size_t begin, size_t end, const StateItems& state, const WrittenMemory& written) {
  // Gradients are other tensors at every step, so where they are is found out on the way: what one look needs is asked
  // for in the look before it.
  constexpr size_t kRing = 8, kToMeta = 6, kToGrad = 4, kToStorage = 2;
  const c10::TensorImpl* grads[kRing] = {};
  for (size_t i = begin; i < end; ++i) {
    fetch(i, end, state);
    if (const c10::TensorImpl* const param = i + kToMeta < end ? param_at(i + kToMeta) : nullptr)
      internals::fetch_grad(*param);
    if (const c10::TensorImpl* const param = i + kToGrad < end ? param_at(i + kToGrad) : nullptr) {
      grads[(i + kToGrad) % kRing] = internals::grad_of(*param).unsafeGetTensorImpl();
      fetch_whole(grads[(i + kToGrad) % kRing]);
    }
    if (const c10::TensorImpl* const grad = i + kToStorage < end ? grads[(i + kToStorage) % kRing] : nullptr)
      fetch_whole(grad->unsafe_storage().unsafeGetStorageImpl());
    if (entries_[i] != kNoEntry && !state.is_unchanged(entries_[i])) return false;
    if (!is_unchanged(i) || !take_grad(i, written)) return false;
    if (steps_ == 0) continue;
    const double count = count_at(i);
    if (!is_count(count)) return false;
    counts_[i] = prepared_.bundles[i].step = count + 1.0;
  }
  return true;
}

void LocalView::finish_look() {
  prepared_.at_one_point =
      std::all_of(counts_.begin(), counts_.end(), [&](double count) { return count == counts_[0]; });
}

std::vector<at::TensorList> LocalView::firsts(size_t count) const {
  std::vector<at::TensorList> lists(count);
  for (size_t c = 0; c < columns_.size(); ++c) lists[columns_[c].list] = THPVariable_Unpack(seen_[c].object);
  lists[kGradOperand] = internals::grad_of(*seen_[0].tensor);
  return lists;
}

void LocalView::note_writes() {
  const size_t width = columns_.size();
  const bool directly = internals::counts_versions_directly();
  const bool in_double = steps_ != 0 && columns_[steps_].kind.storage == Storage::f64;
  for (size_t i = 0; i < size(); ++i) {
    for (size_t c = 0; c < width; ++c) {
      if (i + kAhead < size()) internals::fetch_version(*seen_[(i + kAhead) * width + c].tensor);
      if (columns_[c].is_written) internals::bump_version(*seen_[i * width + c].tensor, directly);
    }
    if (steps_ == 0) continue;
    void* const count = const_cast<void*>(seen_[i * width + steps_].begin());
    prepared_.bundles[i].step = in_double ? *static_cast<double*>(count) += 1.0 : *static_cast<float*>(count) += 1.0f;
  }
}

bool FastPath::should_remember() { return internals::kGilKeepsOthersOut && --wait_ <= 0; }

void FastPath::remember(std::vector<LocalView> views) {
  wait_ = next_wait_;
  next_wait_ = std::min(2 * next_wait_, kLongestWait);
  std::vector<const void*> allocations;
  std::vector<memory::Access> writes;
  int64_t elements = 0;
  for (const LocalView& view : views) {
    view.add_written(allocations, writes, static_cast<int32_t>(&view - views.data()));
    elements += view.elements();
  }
  // Calls that share memory follow one another.
  const memory::Turns turns = memory::turns_of(writes, {}, static_cast<int64_t>(views.size()));
  const bool is_disjoint = views.size() < 2 || (turns.bad_write < 0 && turns.of_member.empty());
  if (views.empty() || elements > kMostElements || !is_disjoint) return;
  written_ = WrittenMemory(allocations);
  taken_ = 0;
  views_ = std::move(views);
  first_.assign(1, 0);
  for (const LocalView& view : views_) first_.push_back(first_.back() + view.size());
}

// Deals out the tensors of all calls as one row.
template <class Visit>
void FastPath::over_all(const Visit& visit) {
  over_tensors(at::kCPU, static_cast<int64_t>(first_.back()), [&](size_t begin, size_t end) {
    for (size_t call = 0; call < views_.size(); ++call) {
      const size_t from = std::max(begin, first_[call]), to = std::min(end, first_[call + 1]);
      if (from < to) visit(views_[call], from - first_[call], to - first_[call]);
    }
  });
}

bool FastPath::look(const StateItems& state) {
  std::atomic<bool> is_same = true;
  over_all([&](LocalView& view, size_t begin, size_t end) {
    if (!view.look(begin, end, state, written_)) is_same = false;
  });
  if (!is_same) {
    forget();
    return false;
  }
  if (++taken_ > kWorthIt) next_wait_ = 1;
  for (LocalView& view : views_) view.finish_look();
  return true;
}

void FastPath::step(const std::vector<Sweep>& sweeps) {
  for (LocalView& view : views_) view.note_writes();
  CpuDriver::run(sweeps);
}

}  // namespace optim_ext::ops
