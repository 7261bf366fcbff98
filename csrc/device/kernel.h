// The words kernels are written in, beside plain C++: where a thread is, memory its block shares, and what threads do
// together. One text of a kernel then compiles for a GPU (cuda/) and for the double that runs it on a CPU (double/).
//
//   OPTIM_EXT_KERNEL(threads[, blocks]) name(OPTIM_EXT_ARGUMENT(Type) argument)   a kernel and its large argument
//   OPTIM_EXT_SHARED(name, Type);                                                 a variable of the block
//   OPTIM_EXT_DEVICE                                                              a function of kernels only
//   thread_x(), block_x(), block_y(), blocks_y()
//   barrier(), fence(), atomic_add(to, value), load_past_l1(from)
//   shuffle_down(mask, value, apart, width), shuffle_from(mask, value, lane, width), shuffle_xor(mask, value, lanes)
#pragma once

#if defined(OPTIM_EXT_DEVICE_DOUBLE)
#include "double/kernel.h"
#else
#include "cuda/kernel.h"
#endif
