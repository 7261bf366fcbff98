// The verbs on a GPU.
#pragma once

#include "verbs.h"

namespace optim_ext::device {

template <class... Parameters>
Status launch(void (*kernel)(Parameters...), const Grid& grid, int threads, Stream stream,
              const std::type_identity_t<Parameters>&... arguments) {
  if (!fits(grid)) return kInvalidGrid;
  void* pointers[] = {const_cast<Parameters*>(&arguments)...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)),
                          dim3(static_cast<unsigned>(threads)), pointers, 0, stream);
}

}  // namespace optim_ext::device
