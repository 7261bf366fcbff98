// The way into the L-BFGS kernels. Pointers inside a task, to rows and to coefficients, are device memory themselves,
// as are the scratch space and the results. Sums are taken in the CPU's order, dot products of bf16 rows excepted.
#pragma once

#include <cuda_runtime_api.h>

#include "../history.h"

namespace optim_ext::cuda {

// `sums`: task.sums() doubles for each tile; `out`: as many.
cudaError_t launch_history_dots(const HistoryDots& task, double* sums, double* out, cudaStream_t stream);

// `norms`: one for each tile.
cudaError_t launch_history_combine(const HistoryCombination& task, Norms* norms, Norms* out, cudaStream_t stream);
cudaError_t launch_norms(const NormsOf& task, Norms* norms, Norms* out, cudaStream_t stream);

}  // namespace optim_ext::cuda
