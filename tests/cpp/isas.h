// The instruction sets this machine has.
#pragma once

#include <utility>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace optim_ext {

inline std::vector<std::pair<const char*, cpu::Isa>> isas() {
  std::vector<std::pair<const char*, cpu::Isa>> found{{"baseline", cpu::Isa::baseline}};
#if OPTIM_EXT_X86_ISAS
  if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", cpu::Isa::avx2});
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back({"avx512", cpu::Isa::avx512});
#endif
  return found;
}

}  // namespace optim_ext
