// The way into the L-BFGS kernels. Pointers inside a task, to rows and to coefficients, are device memory themselves,
// as are the scratch space and the results. Sums are taken in the CPU's order, dot products of bf16 rows excepted.
#pragma once

#include "../../device/device.h"
#include "../history.h"

namespace optim_ext::cuda {

// `sums`: task.sums() doubles for each tile; `out`: as many.
device::Status launch_history_dots(const HistoryDots& task, double* sums, double* out, device::Stream stream);

// `norms`: one for each tile.
device::Status launch_history_combine(const HistoryCombination& task, Norms* norms, Norms* out, device::Stream stream);
device::Status launch_norms(const NormsOf& task, Norms* norms, Norms* out, device::Stream stream);

}  // namespace optim_ext::cuda
