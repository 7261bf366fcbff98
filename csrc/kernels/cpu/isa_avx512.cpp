// The sweeps for AVX512, chosen at run time (x86-64 only).
#include "kernels.h"

#if OPTIM_EXT_X86_ISAS
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own intrinsics (GCC bug 105593)
#endif

#define OPTIM_EXT_TARGET_AVX512
#include "target_begin.h"
#define OPTIM_EXT_ISA isa_avx512
#define OPTIM_EXT_REGISTER_BYTES 64
#include "sweep-inl.h"
#include "history-inl.h"
#include "target_end.h"
#endif
