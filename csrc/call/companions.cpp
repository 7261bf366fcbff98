// What lies beside parameters and state that are kept in another way than the rule sees them.
#include "../storage/block8.h"
#include "../storage/stochastic.h"
#include "call.h"
#include "tensors.h"

#include <ATen/ExpandUtils.h>

namespace optim_ext::ops {

size_t Call::companion_kinds() const {
  const size_t members = rule_.lists[kParam].tensors.size();
  return members == 0 ? 0 : spec_.controls.companions.size() / members;
}

const at::Tensor& Call::companion(size_t kind, int64_t i) const {
  return spec_.controls.companions[kind * rule_.lists[kParam].tensors.size() + static_cast<size_t>(i)];
}

// In this order: what the parameter is kept in besides itself, the key of its random words, where it is in the whole
// that it is a part of, the exponents of each state in q8. The dtype says which of these one is, and how a parameter is
// kept.
void Call::add_companions(int64_t i) {
  Bundle& bundle = bundles[i];
  if (!device.is_cpu() && !spec_.companions_on_gpu)
    refuse("params", i, text("is on ", device, ", where nothing can lie beside it yet"));
  for (int k = 0; k < rule_.count; ++k) {
    if (rule_.is_used(k) && bundle.storage[k] == Storage::f64) refuse(rule_.lists[k].name, i, kNoDouble);
  }
  if (rule_.lists[kParam].tensors[i].is_complex())
    refuse("params", i, "is complex, and nothing can lie beside a complex parameter");
  Companions& made = companions_[i] = Companions{};
  for (size_t kind = 0; kind < companion_kinds(); ++kind) {
    const at::Tensor& tensor = companion(kind, i);
    const char* const name = kCompanions[kind];
    if (!tensor.defined()) refuse(name, i, "is undefined");
    // Where a part is in the whole goes into tables that the host makes.
    const bool is_place = tensor.scalar_type() == at::kLong && follows_key(kind, i);
    const at::Device expected = is_place ? at::kCPU : device;
    if (tensor.layout() != at::kStrided || tensor.device() != expected)
      refuse(name, i, text("is on ", tensor.device(), ", expected a strided tensor on ", expected));
    check_writable(name, i, tensor);
    add_companion(kind, i, made);
  }
  for (int k = 0; k < rule_.count; ++k) {
    if (!rule_.is_used(k) || bundle.storage[k] != Storage::q8) continue;
    if (bundle.numel != 0 && made.exponents[k] == nullptr)
      refuse(rule_.lists[k].name, i, "is in 8 bits, and its scale is missing");
    if (!is_dense_like(rule_.lists[k].tensors[i], rule_.lists[kParam].tensors[i]))
      refuse(rule_.lists[k].name, i, "is in 8 bits, and not in its parameter's memory order");
  }
  if (made.row != 0 && bundle.layout && bundle.layout->rows) {
    const int64_t width = bundle.layout->sizes[1];
    if (width % made.row != 0 && width % kBlock8 != 0)
      refuse("grads", i,
             text("is sparse in rows of ", width, " elements, which cut the blocks of ", kBlock8,
                  " that a state in 8 bits has; make it dense"));
  }
  bundle.companions = &made;
}

void Call::add_companion(size_t kind, int64_t i, Companions& made) {
  const at::Tensor &tensor = companion(kind, i), &param = rule_.lists[kParam].tensors[i];
  const char* const name = kCompanions[kind];
  const Storage storage = bundles[i].storage[kParam];
  const at::ScalarType dtype = tensor.scalar_type();
  if (dtype == at::kByte) return add_exponents(kind, i, made);
  if (dtype == at::kLong && follows_key(kind, i)) return add_place(kind, i, made);
  if (dtype == at::kLong) {
    if (tensor.numel() * tensor.element_size() != sizeof(RoundingKey) || !tensor.is_contiguous())
      refuse(name, i, text("has shape ", tensor.sizes(), ", expected 3 numbers"));
    if (!device.is_cpu()) {  // kernels read it; nothing waits for it
      made.live_key = static_cast<RoundingKey*>(tensor.mutable_data_ptr());
      made.by_chance = spec_.kept;
      made.counts_later = !spec_.counts;
      draws_on_device |= spec_.counts;
      return;
    }
    const RoundingKey& key = *static_cast<const RoundingKey*>(tensor.const_data_ptr());
    made.key = key_at_step(static_cast<uint64_t>(key.key), static_cast<uint64_t>(key.draws) + 1);
    made.by_chance = key.rounded() & spec_.kept;
    made.positive = key.positive();
    if ((made.by_chance & 1u) && (storage != Storage::bf16 || made.precision != Precision::native))
      refuse(name, i, text("rounds a parameter of dtype ", param.scalar_type(), " by chance, expected BFloat16 alone"));
    return;
  }
  if ((spec_.kept & 1u) == 0) return;
  if (storage != Storage::bf16 && storage != Storage::f16)
    refuse("params", i, text("has dtype ", param.scalar_type(), ", which needs nothing besides itself"));
  made.precision = dtype == at::kFloat                               ? Precision::master
                   : dtype == at::kShort && storage == Storage::bf16 ? Precision::remainder
                   : dtype == param.scalar_type()                    ? Precision::kahan
                                                                     : Precision::native;
  if (made.precision == Precision::native || kind != 0)
    refuse(name, i,
           text("has dtype ", dtype, ", expected Float, ", param.scalar_type(), " or, beside BFloat16, Short"));
  if (!tensor.sizes().equals(param.sizes()))
    refuse(name, i, text("has shape ", tensor.sizes(), ", expected its parameter's shape ", param.sizes()));
  if (!is_dense_like(tensor, param))
    refuse(name, i, text("has strides ", tensor.strides(), ", expected its parameter's memory order"));
  made.twin = tensor.mutable_data_ptr();
}

// Of the two kinds that hold whole numbers the key comes first.
bool Call::follows_key(size_t kind, int64_t i) const {
  return kind > 0 && companion(kind - 1, i).scalar_type() == at::kLong;
}

void Call::add_place(size_t kind, int64_t i, Companions& made) {
  const at::Tensor& tensor = companion(kind, i);
  const char* const name = kCompanions[kind];
  if (tensor.dim() != 1 || tensor.numel() % 2 != 1 || !tensor.is_contiguous())
    refuse(name, i, text("has shape ", tensor.sizes(), ", expected an index and two numbers for each dimension"));
  const int64_t* const place = tensor.const_data_ptr<int64_t>();
  const auto ndim = static_cast<int>(tensor.numel() / 2);
  int64_t numel = 1;
  for (int d = 0; d < ndim; ++d) numel *= place[1 + 2 * d];
  if (numel != bundles[i].numel)
    refuse(name, i, text("is about ", numel, " elements, expected its parameter's ", bundles[i].numel));
  made.place = place;
  made.place_ndim = ndim;
}

// Those of the first state in 8 bits that has none yet.
void Call::add_exponents(size_t kind, int64_t i, Companions& made) {
  const at::Tensor &tensor = companion(kind, i), &param = rule_.lists[kParam].tensors[i];
  const char* const name = kCompanions[kind];
  int k = kGrad + 1;
  while (k < rule_.count && !(rule_.is_used(k) && bundles[i].storage[k] == Storage::q8 && !made.exponents[k])) ++k;
  if (k == rule_.count && spec_.kept != kAllKept) return;
  if (k == rule_.count) refuse(name, i, "belongs to no state in 8 bits");
  if (param.dim() == 0) refuse("params", i, "has no rows for a state in 8 bits");
  if (param.numel() == 0) return;
  made.row = param.numel() / param.size(0);
  made.blocks_of_row = (made.row + kBlock8 - 1) / kBlock8;
  const auto strides = at::infer_dense_strides(param.sizes(), param.strides());
  if (param.size(0) > 1 && strides[0] != made.row)
    refuse("params", i,
           "has another dimension than its first one outermost in memory, so its state cannot be in 8 bits");
  if (tensor.dim() != 2 || tensor.size(0) != param.size(0) || tensor.size(1) != made.blocks_of_row ||
      !tensor.is_contiguous())
    refuse(name, i, text("has shape ", tensor.sizes(), ", expected [", param.size(0), ", ", made.blocks_of_row, "]"));
  made.exponents[k] = tensor.mutable_data_ptr<uint8_t>();
}

}  // namespace optim_ext::ops
