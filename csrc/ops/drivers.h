// Every driver this build has, and the line that instantiates an op for each of them.
#pragma once

#include "driver_cpu.h"
#if defined(OPTIM_EXT_WITH_CUDA)
#include "driver_cuda.h"
#define OPTIM_EXT_INSTANTIATE_OP(name)                \
  template decltype(name<CpuDriver>) name<CpuDriver>; \
  template decltype(name<CudaDriver>) name<CudaDriver>;
#else
#define OPTIM_EXT_INSTANTIATE_OP(name) template decltype(name<CpuDriver>) name<CpuDriver>;
#endif
