// The core of the double, for those that give it work.
#pragma once

#include "device/device.h"

namespace optim_ext::device {

// Decides the order of blocks, of threads, and how many blocks are under way at a time.
void set_seed(uint64_t seed);

// Runs a grid to its end, on the calling thread. One grid at a time.
void run_grid(const Launch& launch);

// Ends the process with a message, which also names the kernel that runs.
__attribute__((format(printf, 1, 2))) [[noreturn]] void refuse(const char* format, ...);

}  // namespace optim_ext::device
