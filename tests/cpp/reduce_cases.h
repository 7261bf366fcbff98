// What the CPU's tiles of tensors come to, tensor after tensor.
#pragma once

#include <algorithm>
#include <vector>

#include "cases.h"
#include "kernels/cpu/kernels.h"

namespace optim_ext {

template <class Reduction>
std::vector<double> slots_of(const std::vector<const Bundle*>& bundles, cpu::Isa isa) {
  std::vector<double> slots;
  for (const Bundle* bundle : bundles) {
    const size_t first = slots.size();
    slots.resize(first + reduce_chunks(bundle->numel) * kReduceSlots, 0.0);
    for (int64_t from = 0, slot = 0; from < bundle->numel; from += kReduceTile, ++slot) {
      slots[first + slot] = cpu::reduce_for<Reduction>(isa)(*bundle, from, std::min(bundle->numel, from + kReduceTile));
    }
  }
  return slots;
}

}  // namespace optim_ext
