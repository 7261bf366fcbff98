// By the driver, which is in every process that uses CUDA: it is found there, not linked.
#include <cuda.h>
#include <dlfcn.h>

#include "../device.h"

namespace optim_ext::device {

namespace {

struct Driver {
  decltype(&cuModuleLoadData) load;
  decltype(&cuModuleGetFunction) find;
  decltype(&cuLaunchKernel) launch;
};

const Driver* driver() {
  static const Driver found = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    const auto get = [library](const char* name) { return library == nullptr ? nullptr : dlsym(library, name); };
    return Driver{reinterpret_cast<decltype(Driver::load)>(get("cuModuleLoadData")),
                  reinterpret_cast<decltype(Driver::find)>(get("cuModuleGetFunction")),
                  reinterpret_cast<decltype(Driver::launch)>(get("cuLaunchKernel"))};
  }();
  return found.load && found.find && found.launch ? &found : nullptr;
}

// Errors of driver and runtime have the same numbers.
Status status_of(CUresult result) { return static_cast<Status>(result); }

// Has the calling thread use the current device by the driver, too.
Status use_current_device() {
  int current = 0;
  const Status error = cudaGetDevice(&current);
  return error == cudaSuccess ? cudaSetDevice(current) : error;
}

}  // namespace

Status load(const void* image, Module& module) {
  if (driver() == nullptr) return cudaErrorInsufficientDriver;
  if (const Status error = use_current_device(); error != cudaSuccess) return error;
  return status_of(driver()->load(reinterpret_cast<CUmodule*>(&module), image));
}

Status find(Module module, const char* name, Kernel& kernel) {
  return status_of(driver()->find(reinterpret_cast<CUfunction*>(&kernel), reinterpret_cast<CUmodule>(module), name));
}

Status launch(Kernel kernel, const Grid& grid, int threads, Stream stream, const void* argument) {
  if (!fits(grid)) return kInvalidGrid;
  const auto go = [&] {
    void* pointers[] = {const_cast<void*>(argument)};
    return driver()->launch(reinterpret_cast<CUfunction>(kernel), static_cast<unsigned>(grid.x),
                            static_cast<unsigned>(grid.y), 1, static_cast<unsigned>(threads), 1, 1, 0, stream, pointers,
                            nullptr);
  };
  CUresult result = go();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // in a thread that has not used the device yet
    if (const Status error = use_current_device(); error != cudaSuccess) return error;
    result = go();
  }
  return status_of(result);
}

}  // namespace optim_ext::device
