// The loops of L-BFGS for AVX-512, chosen at run time (x86-64 only). A file for each instruction set, as these loops
// are what takes longest to compile.
#include "history_kernels.h"
#include "isa.h"

#if OPTIM_EXT_X86_ISAS
#define OPTIM_EXT_TARGET_AVX512
#include "target_begin.h"
#define OPTIM_EXT_ISA isa_avx512
#define OPTIM_EXT_REGISTER_BYTES 64
#include "history-inl.h"
#include "target_end.h"
#endif
