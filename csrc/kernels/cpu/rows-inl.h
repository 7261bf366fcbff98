// The rows of sparse gradients. Compiled once per instruction set, as sweep-inl.h, whose part it is.

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// Rows lie anywhere in a table larger than the caches: they are asked for before it is their turn.
constexpr int64_t kRowsAhead = 8, kLinesAhead = 8;

// Row `place` of what has so many bytes for each.
OPTIM_EXT_INLINE void fetch_row_of(const void* data, int64_t place, int64_t bytes) {
  const char* const row = static_cast<const char*>(data) + place * bytes;
  for (int64_t at = 0; at < bytes && at < kLinesAhead * kLine; at += kLine) __builtin_prefetch(row + at, 1);
}

OPTIM_EXT_INLINE void fetch_row(const Bundle& bundle, int64_t n, int operands, unsigned used) {
  const Layout& layout = *bundle.layout;
  for (int k = 0; k < operands; ++k) {
    if (!((used >> k) & 1u)) continue;
    const int64_t place = k != kGradOperand          ? layout.rows[n]
                          : layout.firsts != nullptr ? layout.sources[layout.firsts[n]]
                                                     : n;
    fetch_row_of(bundle.data[k], place, layout.sizes[1] * bytes_of(bundle.storage[k]));
  }
}

// Elements [begin, end) of the rows of a sparse gradient, one row after the other, where nothing needs converting.
template <class Rule, class V>
OPTIM_EXT_INLINE void sweep_rows(const Rule& given, const Bundle& bundle, int64_t begin, int64_t end, V grad_factor) {
  constexpr typename MakeIndices<Rule::kOperands>::type kAll;
  const Rule rule = given;
  const Layout layout = *bundle.layout;
  const int64_t width = layout.sizes[1], last = layout.sizes[0] - 1;
  const TileOperand<V> grads(bundle, kGradOperand);
  alignas(64) V buffer[kTile];
  V* data[Rule::kOperands];
  for (int k = 0; k < Rule::kOperands; ++k) data[k] = static_cast<V*>(bundle.data[k]);
  int64_t row = begin / width, column = begin - row * width;
  for (int64_t start = begin, n; start < end; start += n) {
    if (column == 0) fetch_row(bundle, row + kRowsAhead < last ? row + kRowsAhead : last, Rule::kOperands, Rule::kUsed);
    n = width - column < end - start ? width - column : end - start;
    V* tile[Rule::kOperands];
    for (int k = 0; k < Rule::kOperands; ++k) tile[k] = data[k] + layout.rows[row] * width + column;
    if (layout.firsts == nullptr) {
      tile[kGradOperand] = data[kGradOperand] + start;
    } else if (layout.firsts[row + 1] == layout.firsts[row] + 1) {
      tile[kGradOperand] = data[kGradOperand] + layout.sources[layout.firsts[row]] * width + column;
    } else {
      n = n < kTile ? n : kTile;
      grads.load(Start(nullptr, start), n, buffer);
      tile[kGradOperand] = buffer;
    }
    apply<Rule, V>(rule, tile, n, grad_factor, [](int64_t) __attribute__((always_inline)) {}, kAll);
    column += n;
    if (column == width) {
      column = 0;
      ++row;
    }
  }
}

}  // namespace

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
