// The verbs where there is no torch: whatever is given to the stream runs at once.
#include <cstring>

#include "core.h"

namespace optim_ext::device {

Status queue(const Launch& launch, Stream) {
  run_grid(launch);
  return kSuccess;
}

Status zero(void* memory, int64_t bytes, Stream) {
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return kSuccess;
}

Status upload(void* to, const void* from, int64_t bytes, Stream) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return kSuccess;
}

}  // namespace optim_ext::device
