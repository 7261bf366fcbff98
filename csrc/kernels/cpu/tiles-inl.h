// Tiles of operands, and a rule applied to them. Compiled once per instruction set, as sweep-inl.h, whose part it is.

namespace optim_ext::cpu::OPTIM_EXT_ISA {

// What every loop of a unit calls and none needs a copy of: not inlined, but in the unnamed namespace.
#define OPTIM_EXT_SHARED __attribute__((noinline))

constexpr int64_t kFetched = 32;            // cache lines that are asked for ahead
constexpr int64_t kLongestPiece = 1 << 15;  // elements

// The first element of a tile. What divisions find out about it is found once for all operands.
struct Start {
  int64_t index;
  int64_t places[kMaxDims];

  OPTIM_EXT_INLINE Start(const Layout* layout, int64_t at) : index(at) {
    if (layout != nullptr) layout->find(at, places);
  }
};

// One operand's share of a tile: a pointer to V, which is the memory itself wherever that is possible.
template <class V>
struct TileOperand {
  void* data = nullptr;
  Storage storage = Storage::f32;
  const Layout* layout = nullptr;  // null: dense, also among others that are not
  int operand = 0;

  TileOperand() = default;
  OPTIM_EXT_INLINE TileOperand(const Bundle& bundle, int k)
      : data(bundle.data[k]), storage(bundle.storage[k]), operand(k) {
    if (bundle.layout != nullptr && !bundle.layout->is_dense(k)) layout = bundle.layout;
  }

  OPTIM_EXT_INLINE bool in_place() const { return layout == nullptr && storage == kNative<V>; }
  OPTIM_EXT_INLINE void* at(int64_t start) const { return static_cast<char*>(data) + start * bytes_of(storage); }

  OPTIM_EXT_INLINE V* open(const Start& start, int64_t n, V* buffer) const {
    if (in_place()) return static_cast<V*>(data) + start.index;
    load(start, n, buffer);
    return buffer;
  }

  OPTIM_EXT_INLINE void close(const Start& start, int64_t n, const V* buffer) const {
    if (!in_place()) store(start, n, buffer);
  }

  // Compiled once for all rules: tile_moves-inl.h.
  void load(const Start& start, int64_t n, V* buffer) const;
  void store(const Start& start, int64_t n, const V* buffer) const;

  // Asks for a tile that is read some tiles from now, where the order of memory is not that of the walk: what walk()
  // begins with from `start`, or as much as the tile has of the dense piece of memory that comes `ahead` of it.
  OPTIM_EXT_INLINE void fetch(const Start& start, int64_t n, int64_t ahead) const {
    if (layout == nullptr || layout->rows != nullptr || layout->outer != nullptr || layout->ndim < 2) return;
    if (ahead > 0) {
      const char* const from = static_cast<const char*>(at(start.index + ahead));
      for (int64_t i = 0; i < n * bytes_of(storage); i += kLine) __builtin_prefetch(from + i, 1);
      return;
    }
    const int last = layout->ndim - 1;
    const int64_t* const strides = layout->strides[operand];
    if (strides[last] == 1 || strides[last - 1] != 1) return;
    const char* const from = static_cast<const char*>(at(layout->offset_at(operand, start.places)));
    for (int64_t i = 0; i < layout->sizes[last] && i < kFetched; ++i)
      __builtin_prefetch(from + i * strides[last] * bytes_of(storage), 1);
  }
};

namespace {

// Operand I of element i: for the gradient a value of the rule's own, for one that this variant of the rule does not
// have a scratch value.
template <class Rule, class V, int I>
OPTIM_EXT_INLINE decltype(auto) element(V* const* tile, int64_t i, V& scratch, V grad_factor) {
  if constexpr (I == kGradOperand) {
    return tile[I][i] * grad_factor;
  } else if constexpr ((Rule::kUsed >> I) & 1u) {
    return (tile[I][i]);
  } else {
    return (scratch);
  }
}

// `after(i)` is called when element i has been updated.
template <class Rule, class V, class After, int... I>
OPTIM_EXT_INLINE void apply(const Rule& given, V* const* given_tile, int64_t n, V grad_factor, const After& given_after,
                            Indices<I...>) {
  const Rule rule = given;  // copies, so that no store through a tile can be thought to change them
  const After after = given_after;
  V* const tile[] = {given_tile[I]...};
  OPTIM_EXT_FOR(i, n) {
    V scratch = V(0);
    rule(element<Rule, V, I>(tile, i, scratch, grad_factor)...);
    after(i);
  }
}

// The same for operands that are all stored as bf16: widened and narrowed in registers, as there is more arithmetic to
// that than memory to wait for.
template <class Rule, int... I>
OPTIM_EXT_INLINE void apply_to_bf16(const Rule& given, void* const* data, int64_t start, int64_t n, float grad_factor,
                                    Indices<I...>) {
  const Rule rule = given;
  uint16_t* const tile[] = {((Rule::kUsed >> I) & 1u ? static_cast<uint16_t*>(data[I]) + start : nullptr)...};
  OPTIM_EXT_FOR(i, n) {
    float value[] = {((Rule::kUsed >> I) & 1u ? widen_bf16(tile[I][i]) : 0.0f)...};
    value[kGradOperand] *= grad_factor;
    rule(value[I]...);
    ((((Rule::kUpdates >> I) & 1u) ? static_cast<void>(tile[I][i] = narrow_bf16(value[I])) : void()), ...);
  }
}

}  // namespace

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
