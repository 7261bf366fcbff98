// The CPU's part of a reduction, compiled once per instruction set as sweep-inl.h is, whose operands it opens.
#include "sweep-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

// What element i of opened operands contributes; those a rule does not have are 0.
template <class Rule, int... I>
OPTIM_EXT_INLINE double joint_term(const double* const* tile, int64_t i, Indices<I...>) {
  return Rule::term((((Rule::kUsed >> I) & 1u) ? tile[I][i] : 0.0)...);
}

// A tile of several operands, kTile elements of it at a time.
template <class Rule>
OPTIM_EXT_INLINE double reduce_joint(const Bundle& bundle, int64_t begin, int64_t end) {
  alignas(64) double buffer[Rule::kOperands][kTile];
  double lane[kLanes] = {};
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t n = end - start < kTile ? end - start : kTile;
    const double* tile[Rule::kOperands] = {};
    for (int k = 0; k < Rule::kOperands; ++k) {
      if (!((Rule::kUsed >> k) & 1u)) continue;
      tile[k] = TileOperand<double>(bundle, k).open({bundle.layout, start}, n, buffer[k]);
    }
    reduce_into<rules::Combined<Rule>>(
        lane, n, [&](int64_t i) { return joint_term<Rule>(tile, i, typename MakeIndices<Rule::kOperands>::type{}); });
  }
  return combine_lanes<Rule>(lane);
}

// A tile of the only operand.
template <class Rule>
OPTIM_EXT_INLINE double reduce_single(const Bundle& bundle, int64_t begin, int64_t end) {
  const TileOperand<double> operand(bundle, 0);
  const int64_t size = end - begin;
  if (operand.layout != nullptr) {
    double buffer[kReduceTile];
    operand.load({bundle.layout, begin}, size, buffer);
    return reduce_tile<Rule>(size, [&](int64_t i) { return buffer[i]; });
  }
  switch (operand.storage) {
    case Storage::f32: {
      const float* const x = static_cast<const float*>(operand.at(begin));
      return reduce_tile<Rule>(size, [=](int64_t i) { return static_cast<double>(x[i]); });
    }
    case Storage::f64: {
      const double* const x = static_cast<const double*>(operand.at(begin));
      return reduce_tile<Rule>(size, [=](int64_t i) { return x[i]; });
    }
    case Storage::bf16: {
      const uint16_t* const x = static_cast<const uint16_t*>(operand.at(begin));
      return reduce_tile<Rule>(size, [=](int64_t i) { return static_cast<double>(widen_bf16(x[i])); });
    }
    default: {
      const uint16_t* const x = static_cast<const uint16_t*>(operand.at(begin));
      return reduce_tile<Rule>(size, [=](int64_t i) { return static_cast<double>(widen_f16(x[i])); });
    }
  }
}

// One tile: elements [begin, end), at most kReduceTile of them.
template <class Rule>
double reduce(const Bundle& bundle, int64_t begin, int64_t end) {
  if constexpr (Rule::kOperands == 1) {
    return reduce_single<Rule>(bundle, begin, end);
  } else {
    return reduce_joint<Rule>(bundle, begin, end);
  }
}

// Units [begin, end) of fibers whose elements are widened by `wide`.
template <class Rule, class T, class Widen>
OPTIM_EXT_INLINE void reduce_units(const Fibers& fibers, int64_t begin, int64_t end, const Widen& wide) {
  const int64_t pieces = fibers.pieces(), widths = fibers.widths();
  if (fibers.inner == 1 && !fibers.by_lanes()) {  // each unit is a short fiber
    for (int64_t unit = begin; unit < end; ++unit) {
      const T* const x = static_cast<const T*>(fibers.data) + unit * fibers.along;
      double sum = 0.0;
      for (int64_t a = 0; a < fibers.along; ++a) sum = Rule::combine(sum, Rule::term(wide(x[a])));
      fibers.results[unit] = sum / fibers.divisor;
    }
    return;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t width = unit % widths, piece = unit / widths % pieces, outer = unit / widths / pieces;
    const int64_t size = fibers.size_of(piece), first = width * kFiberWidth;
    const T* const x =
        static_cast<const T*>(fibers.data) + (outer * fibers.along + piece * kFiberPiece) * fibers.inner + first;
    double* const results = fibers.results + (outer * pieces + piece) * fibers.inner + first;
    if (fibers.by_lanes()) {
      *results = reduce_tile<Rule>(size, [=](int64_t i) { return wide(x[i]); }) / fibers.divisor;
      continue;
    }
    const int64_t left = fibers.inner - first, count = left < kFiberWidth ? left : kFiberWidth;
    double sum[kFiberWidth];
    OPTIM_EXT_FOR(i, count) sum[i] = 0.0;
    for (int64_t a = 0; a < size; ++a) {
      const T* const row = x + a * fibers.inner;
      OPTIM_EXT_FOR(i, count) sum[i] = Rule::combine(sum[i], Rule::term(wide(row[i])));
    }
    OPTIM_EXT_FOR(i, count) results[i] = sum[i] / fibers.divisor;
  }
}

template <class Rule>
void reduce_fibers(const Fibers& fibers, int64_t begin, int64_t end) {
  switch (fibers.storage) {
    case Storage::f32:
      return reduce_units<Rule, float>(fibers, begin, end, [](float x) { return static_cast<double>(x); });
    case Storage::f64: return reduce_units<Rule, double>(fibers, begin, end, [](double x) { return x; });
    case Storage::bf16:
      return reduce_units<Rule, uint16_t>(fibers, begin, end,
                                          [](uint16_t x) { return static_cast<double>(widen_bf16(x)); });
    default:
      return reduce_units<Rule, uint16_t>(fibers, begin, end,
                                          [](uint16_t x) { return static_cast<double>(widen_f16(x)); });
  }
}

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
