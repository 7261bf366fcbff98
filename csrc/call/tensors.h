// What the checks of calls ask of single tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <sstream>
#include <string>

#include "../kernels/operand.h"
#include "../memory/extent.h"

namespace optim_ext::ops {

constexpr int kParam = 0, kGrad = kGradOperand;

// What is wrong with a double where something lies beside a parameter.
constexpr const char* kNoDouble = "has dtype Double, expected Float or a type of 16 bits beside companions";

std::optional<Storage> storage_of(at::ScalarType dtype);

// Tells autograd that a tensor has been written.
void note_write(const at::Tensor& tensor);

// Same order of elements in memory; the stride of a dimension of size one means nothing.
bool same_strides(const at::Tensor& a, const at::Tensor& b);

// Whether a tensor of the parameter's shape has its elements without gaps, in the order the parameter has them in
// memory.
bool is_dense_like(const at::Tensor& tensor, const at::Tensor& param);

// A scalar in float or double.
double host_value(const void* data, Storage storage);

memory::Extent extent_of(const at::Tensor& tensor);
// The same for operand `k` of a bundle, which already knows where dense memory lies.
memory::Extent extent_of(const Bundle& bundle, int k, const at::Tensor& tensor);

// Whether no order of its elements can make a tensor's update right.
bool shares_elements(const at::Tensor& tensor);

// Where a tensor's memory was allocated. Views of one allocation have that in common.
inline const void* memory_of(const at::Tensor& tensor) { return tensor.storage().data(); }

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace optim_ext::ops
