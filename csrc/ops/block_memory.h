// Host memory for many vectors that are swept together.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"

namespace optim_ext::ops {

// Bytes of one: vectors of fewer bytes together gain nothing from it.
constexpr int64_t kHugePage = int64_t{2} << 20;

// `count` dense vectors on the CPU, one behind the other in a block of memory that the system is asked to back with
// huge pages, where it has them. Each is a tensor in its own right: it can be saved, copied and kept alone. The block
// is given back with the last of them. Throws c10::OutOfMemoryError.
std::vector<Tensor> vectors_of_one_block(int64_t count, int64_t numel, at::ScalarType dtype);

}  // namespace optim_ext::ops
