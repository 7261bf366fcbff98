#include "companions.h"

#include "../../storage/kahan.h"
#include "../../storage/master.h"
#include "../../storage/remainder.h"
#include "../../storage/stochastic.h"

#define OPTIM_EXT_INL "companions-inl.h"
#include "for_each_isa.h"

namespace optim_ext::cpu {

SweepCompanions companions_kernel_for(Isa isa) {
  static constexpr SweepCompanions kernels[] = OPTIM_EXT_OF_EACH_ISA(sweep_companions);
  return kernels[static_cast<int>(isa)];
}

ReadKept read_kept_kernel_for(Isa isa) {
  static constexpr ReadKept kernels[] = OPTIM_EXT_OF_EACH_ISA(read_kept);
  return kernels[static_cast<int>(isa)];
}

}  // namespace optim_ext::cpu
