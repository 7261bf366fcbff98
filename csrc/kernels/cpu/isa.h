// What code that is compiled once per instruction set uses. It has to be known before the region of an instruction set
// begins: a header first met inside would be compiled for it, and be linked into callers that run without it.
#pragma once

#include "../../rules/average.h"
#include "../convert.h"
#include "kernels.h"

#include <type_traits>

#if OPTIM_EXT_X86_ISAS
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own intrinsics (GCC bug 105593)
#endif
#endif

namespace optim_ext::cpu {

// std::index_sequence without <utility>: no library code is to be instantiated under the flags of an instruction set.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

}  // namespace optim_ext::cpu
