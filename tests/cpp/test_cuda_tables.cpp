// The tables of CUDA launches for sizes no test can allocate. What blocks do with their piece is tested on the double
// (cuda_double/).
#include <vector>

#include "check.h"
#include "kernels/cuda/block.h"
#include "kernels/cuda/table.h"

using namespace optim_ext;

namespace {

// A rule that is never applied.
struct Count {
  static constexpr int kOperands = 2;
  static constexpr unsigned kUsed = 3, kUpdates = 1;
  OPTIM_EXT_RULE Count at_step(double) const { return *this; }
};

// The pieces of all blocks still tile each tensor, without a 32-bit number overflowing.
void test_beyond_32_bits() {
  std::vector<Bundle> made(3);
  made[0].numel = 5;
  made[1].numel = (int64_t{1} << 33) + 12345;
  made[2].numel = (int64_t{1} << 31) + 1;
  std::vector<const Bundle*> bundles;
  int64_t elements = 0;
  for (const Bundle& bundle : made) {
    bundles.push_back(&bundle);
    elements += bundle.numel;
  }
  cuda::Batch<Count> batch{};
  batch.chunk = cuda::chunk_for(elements, 132);
  batch.count = 3;
  const auto shape = cuda::fitting(cuda::shape_of<Count>(), bundles.data(), 3, INT64_MAX);
  std::vector<unsigned char> table(shape.bytes());
  const int64_t chunks = cuda::fill_table(bundles.data(), shape, batch.chunk, table.data());
  size_t tensor = 0;
  int64_t next = 0;
  for (int64_t index = 0; index < chunks; ++index) {
    cuda::Block<Count> block;
    cuda::open_block(batch, table.data(), index, block);
    const bool follows = tensor < made.size() && block.entry.numel == made[tensor].numel && block.begin == next;
    check(follows && block.size > 0 && block.size <= batch.chunk, "block %ld begins at %ld", static_cast<long>(index),
          static_cast<long>(block.begin));
    next = block.begin + block.size;
    if (next == block.entry.numel) ++tensor, next = 0;
  }
  check(tensor == made.size() && next == 0, "the blocks end in tensor %zu", tensor);
}

void test_chunks() {
  for (const int multiprocessors : {1, 16, 132}) {
    for (int64_t elements = 1; elements < int64_t{1} << 40; elements *= 3) {
      const int64_t chunk = cuda::chunk_for(elements, multiprocessors);
      check(chunk >= cuda::kMinChunk && chunk % cuda::kMinChunk == 0 && chunk <= INT32_MAX / 16, "a chunk of %ld",
            static_cast<long>(chunk));
    }
  }
}

}  // namespace

int main() {
  test_chunks();
  test_beyond_32_bits();
  return verdict();
}
