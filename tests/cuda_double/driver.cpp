// A stand-in for the driver, libcuda.so.1: torch opens it when it begins to use CUDA, and asks little of it. Modules
// are shared libraries here (nvrtc.cpp compiles them), and their kernels go along streams as all others do.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>

#include "core.h"
#include "kernels/cuda/batch.h"

namespace {
constexpr int kInvalidImage = 200, kNotFound = 500, kNotSupported = 801;

// A kernel of a module: it takes one argument, the largest there is.
constexpr int64_t kBytes = optim_ext::cuda::kArgumentBytes;
struct Kernel {
  std::string name;
  void (*function)(const void*);
};
struct Work {
  void (*function)(const void*);
  alignas(16) unsigned char argument[kBytes];
};

int load(void** module, const void* image) {
  const auto& header = *static_cast<const Elf64_Ehdr*>(image);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return kInvalidImage;
  const size_t bytes = header.e_shoff + static_cast<size_t>(header.e_shnum) * header.e_shentsize;  // sections end it
  const int file = memfd_create("a module of the double", MFD_CLOEXEC);
  if (file < 0 || write(file, image, bytes) != static_cast<ssize_t>(bytes)) return kInvalidImage;
  // The loader takes a path that it has seen before for the library it has loaded before.
  static int count = 0;
  const std::string path = "/proc/self/fd" + std::string(static_cast<size_t>(++count), '/') + std::to_string(file);
  *module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  close(file);
  return *module == nullptr ? kInvalidImage : 0;
}
void* const context = reinterpret_cast<void*>(1);
}  // namespace

#define NOT_SUPPORTED(name) \
  int name() { return kNotSupported; }

extern "C" {

NOT_SUPPORTED(cuCtxSetCurrent)
NOT_SUPPORTED(cuDeviceGetAttribute)
NOT_SUPPORTED(cuFuncGetAttribute)
NOT_SUPPORTED(cuFuncSetAttribute)
NOT_SUPPORTED(cuFuncSetCacheConfig)
NOT_SUPPORTED(cuLaunchCooperativeKernel)
NOT_SUPPORTED(cuLinkAddData_v2)
NOT_SUPPORTED(cuLinkComplete)
NOT_SUPPORTED(cuLinkCreate_v2)
NOT_SUPPORTED(cuModuleLoad)
NOT_SUPPORTED(cuModuleLoadDataEx)
NOT_SUPPORTED(cuModuleUnload)
NOT_SUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_SUPPORTED(cuPointerGetAttribute)
NOT_SUPPORTED(cuTensorMapEncodeTiled)

int cuModuleLoadData(void** module, const void* image) { return load(module, image); }
int cuModuleGetFunction(void** kernel, void* module, const char* name) {
  void* const function = dlsym(module, name);
  if (function == nullptr) return kNotFound;
  *kernel = new Kernel{name, reinterpret_cast<void (*)(const void*)>(function)};  // modules stay
  return 0;
}
int cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned, unsigned threads, unsigned, unsigned, unsigned,
                   void* stream, void** arguments, void**) {
  const Kernel& found = *static_cast<const Kernel*>(kernel);
  const auto work = std::make_shared<Work>();
  work->function = found.function;
  std::memcpy(work->argument, arguments[0], kBytes);
  const auto invoke = [](const void* of) {
    const Work& given = *static_cast<const Work*>(of);
    given.function(given.argument);
  };
  return optim_ext::device::queue({found.name.c_str(), {x, y}, static_cast<int>(threads), invoke, work, kBytes},
                                  static_cast<optim_ext::device::Stream>(stream));
}

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "the double has no driver";
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 2;
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
int cuCtxGetCurrent(void** current) {
  *current = context;
  return 0;
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** primary, int) {
  *primary = context;
  return 0;
}
int cuGetProcAddress_v2(const char*, void** function, int, unsigned long long, int*) {
  *function = nullptr;
  return kNotFound;
}

}  // extern "C"
