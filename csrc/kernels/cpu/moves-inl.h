// Loops, and elements that change places on their way. Compiled once per instruction set, as sweep-inl.h, whose part it
// is.

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

#define OPTIM_EXT_INLINE inline __attribute__((always_inline))

// Elements converted at a time where memory and arithmetic differ in type: small enough that the buffers stay in L1.
constexpr int64_t kTile = 512;

template <class V>
constexpr Storage kNative = sizeof(V) == 8 ? Storage::f64 : Storage::f32;

// A loop the compiler turns into one packed loop; its iterations are independent by construction.
#define OPTIM_EXT_FOR(i, n) _Pragma("GCC ivdep") for (int64_t i = 0; i < (n); ++i)

// Square matrices of as many rows as a register has elements, turned in registers: step by step, blocks of half the
// size change places.
template <class T>
struct Square {
  static constexpr int kBytes = OPTIM_EXT_REGISTER_BYTES < 32 ? OPTIM_EXT_REGISTER_BYTES : 32;
  static constexpr int kRows = kBytes / sizeof(T);
  typedef T Row __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));

  // Of each pair of blocks of kHalf columns the first (or second) ones of both rows, one after the other.
  template <int kHalf, int kSecond, int... I>
  static OPTIM_EXT_INLINE Row join(Row a, Row b, Indices<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((I & kHalf) ? kRows + I - kHalf + kSecond : I + kSecond)...);
#else
    using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    typedef Index Mask __attribute__((vector_size(kBytes)));
    return __builtin_shuffle(a, b, Mask{((I & kHalf) ? kRows + I - kHalf + kSecond : I + kSecond)...});
#endif
  }

  template <int kHalf>
  static OPTIM_EXT_INLINE void swap_blocks(Row* rows) {
    constexpr typename MakeIndices<kRows>::type kAll;
    for (int i = 0; i < kRows; ++i) {
      if (i & kHalf) continue;
      const Row first = rows[i], second = rows[i + kHalf];
      rows[i] = join<kHalf, 0>(first, second, kAll);
      rows[i + kHalf] = join<kHalf, kHalf>(first, second, kAll);
    }
    if constexpr (kHalf > 1) swap_blocks<kHalf / 2>(rows);
  }

  static OPTIM_EXT_INLINE void turn(const T* from, int64_t from_step, T* to, int64_t to_step) {
    Row rows[kRows];
    for (int i = 0; i < kRows; ++i) __builtin_memcpy(&rows[i], from + i * from_step, kBytes);
    swap_blocks<kRows / 2>(rows);
    for (int i = 0; i < kRows; ++i) __builtin_memcpy(to + i * to_step, &rows[i], kBytes);
  }
};

constexpr int64_t kLine = 64;  // bytes of a cache line

// Asks for the lines of a square of elements, if it begins with them: the first of each row is element i * step. They
// go to the second cache: the first one is full of what the present block needs.
template <class T>
OPTIM_EXT_INLINE void fetch_square(const T* from, int64_t step, int64_t place) {
  if (place * static_cast<int64_t>(sizeof(T)) % kLine != 0) return;
  for (int i = 0; i < Square<T>::kRows; ++i) __builtin_prefetch(from + i * step, 1, 2);
}

// to[r * to_step + c] = from[c * from_step + r] for all r below `rows` and c below `columns`. The squares come in the
// order of the matrix with the longer step, whose cache lines would else be left before they are used up. before(r, c)
// is called ahead of each.
template <class T, class Before>
OPTIM_EXT_INLINE void transpose(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t columns,
                                const Before& given) {
  constexpr int kSide = Square<T>::kRows;
  const int64_t whole_rows = rows - rows % kSide, whole_columns = columns - columns % kSide;
  const Before before = given;
  const auto turn = [=](int64_t r, int64_t c) __attribute__((always_inline)) {
    before(r, c);
    Square<T>::turn(from + c * from_step + r, from_step, to + r * to_step + c, to_step);
  };
  if (from_step > to_step) {
    for (int64_t c = 0; c < whole_columns; c += kSide) {
      for (int64_t r = 0; r < whole_rows; r += kSide) turn(r, c);
    }
  } else {
    for (int64_t r = 0; r < whole_rows; r += kSide) {
      for (int64_t c = 0; c < whole_columns; c += kSide) turn(r, c);
    }
  }
  for (int64_t c = whole_columns; c < columns; ++c) {
    for (int64_t r = 0; r < whole_rows; ++r) to[r * to_step + c] = from[c * from_step + r];
  }
  for (int64_t r = whole_rows; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[r * to_step + c] = from[c * from_step + r];
  }
}

template <class T>
OPTIM_EXT_INLINE void transpose(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows,
                                int64_t columns) {
  transpose(from, from_step, to, to_step, rows, columns, [](int64_t, int64_t) __attribute__((always_inline)) {});
}

}  // namespace

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
