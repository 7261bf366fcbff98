// Every driver this build has, and the line that instantiates an op for each of them.
#pragma once

#include "driver_cpu.h"
#define OPTIM_EXT_INSTANTIATE_FOR(driver, name, ...) \
  template decltype(name<driver __VA_OPT__(, ) __VA_ARGS__>) name<driver __VA_OPT__(, ) __VA_ARGS__>;
#if defined(OPTIM_EXT_WITH_CUDA)
#include "driver_cuda.h"
#define OPTIM_EXT_INSTANTIATE_OP(...)               \
  OPTIM_EXT_INSTANTIATE_FOR(CpuDriver, __VA_ARGS__) \
  OPTIM_EXT_INSTANTIATE_FOR(CudaDriver, __VA_ARGS__)
#else
#define OPTIM_EXT_INSTANTIATE_OP(...) OPTIM_EXT_INSTANTIATE_FOR(CpuDriver, __VA_ARGS__)
#endif
