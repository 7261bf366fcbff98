#include "driver_cpu.h"

#include <ATen/Version.h>
#include <pthread.h>

namespace optim_ext::ops {

cpu::Isa current_isa() {
  static const cpu::Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
    if (!OPTIM_EXT_X86_ISAS) return cpu::Isa::baseline;
    if (capability == "AVX512") return cpu::Isa::avx512;
    if (capability == "AVX2") return cpu::Isa::avx2;
    return cpu::Isa::baseline;
  }();
  return isa;
}

const char* isa_name(cpu::Isa isa) {
  return isa == cpu::Isa::avx512 ? "avx512" : isa == cpu::Isa::avx2 ? "avx2" : "baseline";
}

namespace {
bool forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

bool in_forked_child() { return forked; }

}  // namespace optim_ext::ops
