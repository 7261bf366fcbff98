#include "tensors.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>

#include "../memory/overlap.h"

namespace optim_ext::ops {

using memory::Extent;

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

bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), sa = a.strides(), sb = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && sa[d] != sb[d]) return false;
  }
  return true;
}

bool is_dense_like(const at::Tensor& tensor, const at::Tensor& param) {
  const auto strides = at::infer_dense_strides(param.sizes(), param.strides());
  for (size_t d = 0; d < strides.size(); ++d) {
    if (param.size(static_cast<int64_t>(d)) > 1 && tensor.stride(static_cast<int64_t>(d)) != strides[d]) return false;
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

Extent extent_of(const Bundle& bundle, int k, const at::Tensor& tensor) {
  if (bundle.layout != nullptr) return extent_of(tensor);
  return memory::dense_extent(bundle.data[k], bundle.numel * bytes_of(bundle.storage[k]));
}

bool shares_elements(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return false;
  int64_t budget = memory::kPairBudget;
  return at::has_internal_overlap(tensor) == at::MemOverlap::Yes ||
         memory::overlap_within(extent_of(tensor), budget) == memory::Overlap::some;
}

}  // namespace optim_ext::ops
