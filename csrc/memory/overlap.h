// Whether strided arrays share elements, decided by their strides.
#pragma once

#include "extent.h"

namespace optim_ext::memory {

enum class Overlap {
  none,
  some,
  unknown,  // not decided within the budget
};

// Places tried while strides are compared. Where the strides of each array are nested, as those of views of one matrix
// are, a handful is enough.
constexpr int64_t kPairBudget = int64_t{1} << 16;

// Whether two extents share a byte. What the search costs is taken off `budget`; it takes no memory.
Overlap overlap(const Extent& a, const Extent& b, int64_t& budget);

// Whether two places of one extent are the same byte.
Overlap overlap_within(const Extent& extent, int64_t& budget);

}  // namespace optim_ext::memory
