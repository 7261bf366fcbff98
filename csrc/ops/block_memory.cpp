#include "block_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <utility>

namespace optim_ext::ops {

namespace {

constexpr int64_t kPage = 4096, kLine = 64;

int64_t rounded_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

// Memory that begins with a huge page. The tensor owns it.
std::pair<Tensor, char*> block_of(int64_t bytes) {
  Tensor owner = at::empty({bytes + kHugePage}, at::kByte);
  const auto address = reinterpret_cast<std::uintptr_t>(owner.mutable_data_ptr());
  char* const begin = reinterpret_cast<char*>(rounded_up(static_cast<int64_t>(address), kHugePage));
#if defined(__linux__)
  madvise(begin, bytes, MADV_HUGEPAGE);  // a hint: where it is refused, small pages do
#endif
  return {std::move(owner), begin};
}

}  // namespace

std::vector<Tensor> vectors_of_one_block(int64_t count, int64_t numel, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(count >= 0 && numel >= 0, "optim_ext: ", count, " vectors of ", numel, " elements");
  // Vectors a multiple of a page apart would compete for the same places in the first cache.
  int64_t stride = rounded_up(numel * static_cast<int64_t>(c10::elementSize(dtype)), kLine);
  if (stride % kPage == 0) stride += 3 * kLine;
  const auto [owner, begin] = block_of(rounded_up(count * stride, kHugePage));
  std::vector<Tensor> vectors;
  vectors.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    vectors.push_back(at::from_blob(begin + i * stride, {numel}, [owner = owner](void*) {}, at::TensorOptions(dtype)));
  }
  return vectors;
}

}  // namespace optim_ext::ops
