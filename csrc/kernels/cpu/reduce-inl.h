// The CPU's part of a reduction, included by sweep-inl.h inside the namespace of an instruction set.

// One tile of the only operand: elements [begin, end), at most kReduceTile of them.
template <class Rule>
double reduce(const Bundle& bundle, int64_t begin, int64_t end) {
  const TileOperand<double> operand{bundle.data[0], bundle.storage[0], bundle.layout, 0};
  const int64_t size = end - begin;
  if (bundle.layout != nullptr) {
    double buffer[kReduceTile];
    operand.open(begin, size, buffer);
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

#define OPTIM_EXT_INSTANTIATE(rule) template double reduce<rules::rule>(const Bundle&, int64_t, int64_t);
OPTIM_EXT_FOR_EACH_REDUCTION(OPTIM_EXT_INSTANTIATE)
#undef OPTIM_EXT_INSTANTIATE
