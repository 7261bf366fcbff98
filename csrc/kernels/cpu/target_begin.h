// Opens a region compiled for one instruction set, in the spelling of the compiler at hand. No include guard.
// FMA is not enabled: contraction is off anyway, and the same bits at every instruction set are worth more.
#if defined(OPTIM_EXT_TARGET_AVX512)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#elif defined(OPTIM_EXT_TARGET_AVX2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#else
#error "set OPTIM_EXT_TARGET_AVX2 or OPTIM_EXT_TARGET_AVX512 before including target_begin.h"
#endif
