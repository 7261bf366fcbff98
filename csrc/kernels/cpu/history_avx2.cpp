// The loops of L-BFGS for AVX2, chosen at run time (x86-64 only).
#include "history_kernels.h"
#include "isa.h"

#if OPTIM_EXT_X86_ISAS
#define OPTIM_EXT_TARGET_AVX2
#include "target_begin.h"
#define OPTIM_EXT_ISA isa_avx2
#define OPTIM_EXT_REGISTER_BYTES 32
#include "history-inl.h"
#include "target_end.h"
#endif
