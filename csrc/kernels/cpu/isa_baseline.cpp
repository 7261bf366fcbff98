// The sweeps for the compiler's default target.
#include "kernels.h"

#define OPTIM_EXT_ISA isa_baseline
#define OPTIM_EXT_REGISTER_BYTES 16
#include "sweep-inl.h"
#include "history-inl.h"
