// Includes the file OPTIM_EXT_INL once per instruction set, inside the region compiled for it, with the namespace to
// put everything into as OPTIM_EXT_ISA. No include guard.
#include "isa.h"

#define OPTIM_EXT_ISA isa_baseline
#define OPTIM_EXT_REGISTER_BYTES 16
#include OPTIM_EXT_INL
#undef OPTIM_EXT_ISA
#undef OPTIM_EXT_REGISTER_BYTES

#if OPTIM_EXT_X86_ISAS
#define OPTIM_EXT_TARGET_AVX2
#include "target_begin.h"
#define OPTIM_EXT_ISA isa_avx2
#define OPTIM_EXT_REGISTER_BYTES 32
#include OPTIM_EXT_INL
#include "target_end.h"
#undef OPTIM_EXT_TARGET_AVX2
#undef OPTIM_EXT_ISA
#undef OPTIM_EXT_REGISTER_BYTES

#define OPTIM_EXT_TARGET_AVX512
#include "target_begin.h"
#define OPTIM_EXT_ISA isa_avx512
#define OPTIM_EXT_REGISTER_BYTES 64
#include OPTIM_EXT_INL
#include "target_end.h"
#undef OPTIM_EXT_TARGET_AVX512
#undef OPTIM_EXT_ISA
#undef OPTIM_EXT_REGISTER_BYTES

#define OPTIM_EXT_OF_EACH_ISA(...) {&isa_baseline::__VA_ARGS__, &isa_avx2::__VA_ARGS__, &isa_avx512::__VA_ARGS__}
#else
#define OPTIM_EXT_OF_EACH_ISA(...) {&isa_baseline::__VA_ARGS__, &isa_baseline::__VA_ARGS__, &isa_baseline::__VA_ARGS__}
#endif
