// The loops of L-BFGS for the compiler's default target.
#include "history_kernels.h"
#include "isa.h"

#define OPTIM_EXT_ISA isa_baseline
#define OPTIM_EXT_REGISTER_BYTES 16
#include "history-inl.h"
