// Where the elements of a strided array lie, by value: an extent outlives the array it was taken of.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace optim_ext::memory {

// One dimension of an extent: how many places, and how many bytes from one to the next.
struct Dim {
  int64_t size, stride;
  bool operator==(const Dim&) const = default;
};

// The bytes begin + i0 * stride0 + i1 * stride1 + ..., for every place in every dimension. The bytes of an element are
// the last dimension. Strides are positive and descend; dimensions that can be walked as one are one, so equal extents
// have equal members.
struct Extent {
  uintptr_t begin = 0, end = 0;  // the first byte and the one behind the last; equal where there are none
  std::vector<Dim> dims;         // empty: every byte from begin to end

  bool operator==(const Extent&) const = default;
  bool is_dense() const { return dims.empty(); }
  bool meets(const Extent& other) const { return std::max(begin, other.begin) < std::min(end, other.end); }
};

inline Extent dense_extent(const void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + static_cast<uintptr_t>(bytes), {}};
}

// Of an array whose strides count elements of `element_bytes` and are not negative. A stride of 0 repeats elements: it
// adds no place.
inline Extent strided_extent(const void* data, int64_t element_bytes, std::span<const int64_t> sizes,
                             std::span<const int64_t> strides) {
  std::vector<Dim> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return dense_extent(data, 0);
    if (sizes[d] > 1 && strides[d] > 0) dims.push_back({sizes[d], strides[d] * element_bytes});
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  dims.push_back({element_bytes, 1});
  Extent extent = dense_extent(data, 1);
  for (const Dim& dim : dims) {
    extent.end += static_cast<uintptr_t>((dim.size - 1) * dim.stride);
    if (!extent.dims.empty() && extent.dims.back().stride == dim.size * dim.stride) {
      extent.dims.back() = {extent.dims.back().size * dim.size, dim.stride};
    } else {
      extent.dims.push_back(dim);
    }
  }
  if (extent.dims.size() == 1) extent.dims.clear();  // the bytes of all elements, one behind the other
  return extent;
}

}  // namespace optim_ext::memory
