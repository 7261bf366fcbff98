// Most tensors of a call are alike. These are checked on all threads at once, and quickly.
#include <algorithm>

#include "call.h"
#include "parallel.h"
#include "tensors.h"

namespace optim_ext::ops {

namespace {
constexpr int64_t kAhead = 8;  // tensors
}  // namespace

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

  if (!spec_.controls.companions.empty()) {
    companions_.resize(count);
    for (int64_t i = 0; i < count; ++i) add_companions(i);
  }
  if (spec_.controls.averages.empty()) return;
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
    if (first.layout() != at::kStrided || !first.has_storage() || !storage_of(first.scalar_type())) return false;
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

}  // namespace optim_ext::ops
