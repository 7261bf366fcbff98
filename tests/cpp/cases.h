// Made-up work for a sweep: rules with numbers in them, parameters with their state in memory that is exactly as long
// as needed, and the comparison of two such sets of memory.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "kernels/convert.h"
#include "kernels/operand.h"
#include "rules/rule.h"

namespace optim_ext {

// Rules are aggregates of doubles and bools; this fills any of them, in field order.
struct Filler {
  unsigned* bools;  // bit 0 is the next switch
  int* zero_in;     // doubles until the one that is zero: no weight decay, no dampening, ...
  Random* random;
  operator double() const { return (*zero_in)-- == 0 ? 0.0 : random->uniform(0.05, 0.95); }
  operator bool() const {
    const bool bit = *bools & 1u;
    *bools >>= 1;
    return bit;
  }
};

template <class Rule, size_t... I>
constexpr bool has_fields(std::index_sequence<I...>) {
  return requires(Filler f) { Rule{(static_cast<void>(I), f)...}; };
}

template <class Rule, size_t N = 16>
constexpr size_t count_fields() {
  if constexpr (has_fields<Rule>(std::make_index_sequence<N>{})) {
    return N;
  } else {
    return count_fields<Rule, N - 1>();
  }
}

template <class Rule>
Rule filled(unsigned bools, int zero_in, Random& random) {
  const Filler f{&bools, &zero_in, &random};
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return Rule{(static_cast<void>(I), f)...};
  }(std::make_index_sequence<count_fields<Rule>()>{});
}

// The numbers a parameter's state may hold, before a step.
inline std::array<rules::Scalar, kMaxScalars> scalars_before(bool is_double) {
  std::array<rules::Scalar, kMaxScalars> scalars;
  for (int k = 0; k < kMaxScalars; ++k) scalars[k] = {0.75 - 0.25 * k, is_double};
  return scalars;
}

// A rule as it stands at a step; `scalars`, for rules that have them, become what they are after it.
template <class Rule>
Rule at_step(const Rule& rule, double step, std::array<rules::Scalar, kMaxScalars>& scalars) {
  if constexpr (rules::kScalarsOf<Rule> == 0) {
    return rule.at_step(step);
  } else {
    return rule.at_step(step, scalars.data());
  }
}

template <class Rule>
Rule at_step(const Rule& rule, double step) {
  auto scalars = scalars_before(false);
  return at_step(rule, step, scalars);
}

struct Operand {
  std::unique_ptr<unsigned char[]> memory;  // exactly as long as needed, so that the sanitizer sees a step too far
  int64_t bytes;
};

struct Case {
  Bundle bundle{};
  Layout layout{};
  std::vector<Operand> operands;

  Case clone() const {
    Case copy;
    copy.bundle = bundle;
    copy.layout = layout;
    for (size_t k = 0; k < operands.size(); ++k) {
      Operand operand{std::make_unique<unsigned char[]>(operands[k].bytes), operands[k].bytes};
      std::memcpy(operand.memory.get(), operands[k].memory.get(), operand.bytes);
      copy.bundle.data[k] =
          operand.memory.get() + (static_cast<unsigned char*>(bundle.data[k]) - operands[k].memory.get());
      copy.operands.push_back(std::move(operand));
    }
    return copy;
  }
  const Bundle& ready() {
    bundle.layout = layout.ndim > 0 ? &layout : nullptr;
    return bundle;
  }
};

using Storages = std::vector<Storage>;  // per operand, the last one repeated

// How the operands of a case lie in memory.
enum Strides : int {
  kDense,    // in one order, without gaps
  kMixed,    // each operand has its own order of dimensions, with gaps
  kRows,     // rows of one piece in every operand, with gaps between them
  kSquares,  // rows in some operands, columns of the same small matrices in the others
  kColumn,   // every so many elements
  kStrides
};

// Sizes and strides that only a walk can follow.
inline void make_strided(Layout& layout, int strides, int operands, int64_t numel) {
  if (strides == kColumn) {
    layout.ndim = 1;
    layout.sizes[0] = numel;
    for (int k = 0; k < operands; ++k) layout.strides[k][0] = 2 + k;
    return;
  }
  layout.ndim = 3;
  if (strides == kMixed) {
    layout.sizes[2] = numel % 7 == 0 ? 7 : numel % 2 == 0 ? 2 : 1;
    layout.sizes[1] = (numel / layout.sizes[2]) % 3 == 0 ? 3 : 1;
  } else {
    layout.sizes[2] = 1;
    for (int64_t length = 3; length <= 21; ++length) layout.sizes[2] = numel % length == 0 ? length : layout.sizes[2];
    const int64_t rows = numel / layout.sizes[2];
    layout.sizes[1] = 1;
    for (int64_t count = 2; count <= 19; ++count) layout.sizes[1] = rows % count == 0 ? count : layout.sizes[1];
  }
  layout.sizes[0] = numel / layout.sizes[2] / layout.sizes[1];
  const int orders[][3] = {{0, 1, 2}, {2, 1, 0}, {1, 0, 2}, {2, 0, 1}, {0, 2, 1}, {1, 2, 0}};
  for (int k = 0; k < operands; ++k) {
    int64_t stride = strides == kMixed ? 1 + k % 3 : 1;
    for (int d = 2; d >= 0; --d) {
      const int dim = strides == kMixed ? orders[k % 6][d] : strides == kSquares && k % 2 == 1 && d > 0 ? 3 - d : d;
      layout.strides[k][dim] = stride;
      stride = stride * layout.sizes[dim] + (strides == kMixed ? (k == 3) * stride : d == 2 ? k % 3 : 0);
    }
  }
}

// Up to four elements lie before the data, which then need not be aligned to a vector; none if `aligned`.
template <class Rule>
Case make_case(int64_t numel, const Storages& storages, int strides, Random& random, bool aligned = false) {
  Case made;
  made.bundle.numel = numel;
  if (strides != kDense) make_strided(made.layout, strides, Rule::kOperands, numel);
  for (int k = 0; k < Rule::kOperands; ++k) {
    const Storage storage = storages[k < static_cast<int>(storages.size()) ? k : storages.size() - 1];
    const bool used = (Rule::kUsed >> k) & 1u;
    int64_t last = numel - 1;
    if (strides != kDense && numel > 0) {
      last = 0;
      for (int d = 0; d < made.layout.ndim; ++d) last += (made.layout.sizes[d] - 1) * made.layout.strides[k][d];
    }
    const int64_t lead = used && !aligned ? static_cast<int64_t>(random.bits() % 5) : 0;
    const int64_t length = used ? lead + last + 1 : 0;
    Operand operand{std::make_unique<unsigned char[]>(length * bytes_of(storage)), length * bytes_of(storage)};
    for (int64_t i = 0; i < length; ++i) {
      store_element<double>(operand.memory.get(), storage, i, random.uniform(k < 2 ? -2.0 : 0.5, 2.0));
    }
    made.bundle.data[k] = operand.memory.get() + lead * bytes_of(storage);
    made.bundle.storage[k] = storage;
    made.operands.push_back(std::move(operand));
  }
  return made;
}

// What a sweep of a tensor is given beside the tensor. All of it is drawn, so that anything meets anything else.
struct Scene {
  unsigned switches;
  int zero;  // which number of the rule is zero; -1: none
  double step;
  int strides;
  Pass pass;
  int64_t begin, end;
};

inline Scene draw_scene(int64_t numel, Random& random) {
  Scene scene;
  scene.switches = static_cast<unsigned>(random.below(8));
  scene.zero = static_cast<int>(random.below(7)) - 1;
  scene.step = 1.0 + static_cast<double>(random.below(5));
  const bool strided = random.one_in(3) && numel > 0;
  scene.strides = strided ? kMixed + static_cast<int>(random.below(kStrides - kMixed)) : kDense;
  scene.pass.unscale = random.one_in(4);
  scene.pass.grad_scale = random.one_in(2) ? 3.0 : 4.0;
  if (random.one_in(3)) scene.pass.grad_factor = 0.3;
  scene.begin = random.one_in(5) ? numel / 3 : 0;
  scene.end = random.one_in(11) ? numel - numel / 4 : numel;
  return scene;
}

// Equal bytes; where both hold a NaN its payload is free.
inline bool same(const Case& a, const Case& b, int* operand, int64_t* element) {
  for (size_t k = 0; k < a.operands.size(); ++k) {
    const Storage storage = a.bundle.storage[k];
    const unsigned char *x = a.operands[k].memory.get(), *y = b.operands[k].memory.get();
    if (std::memcmp(x, y, a.operands[k].bytes) == 0) continue;
    for (int64_t i = 0; i < a.operands[k].bytes / bytes_of(storage); ++i) {
      const bool equal = std::memcmp(x + i * bytes_of(storage), y + i * bytes_of(storage), bytes_of(storage)) == 0;
      if (equal || (std::isnan(load_element<double>(x, storage, i)) && std::isnan(load_element<double>(y, storage, i))))
        continue;
      *operand = static_cast<int>(k);
      *element = i;
      return false;
    }
  }
  return true;
}

}  // namespace optim_ext
