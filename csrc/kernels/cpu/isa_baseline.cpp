// The sweeps for the compiler's default target.
#include "kernels.h"

#define OPTIM_EXT_ISA isa_baseline
#include "sweep-inl.h"
