// Sums in a fixed order, written with vectors of a fixed number of lanes, as a compiler may not reorder them itself:
// the registers of each instruction set hold them in one, two or four pieces, which changes nothing in the order of
// additions. Compiled once per instruction set as sweep-inl.h is.
namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

constexpr int kPack = OPTIM_EXT_REGISTER_BYTES / 8;  // lanes in one register
constexpr int kPacks = kHistoryLanes / kPack;

typedef double Doubles __attribute__((vector_size(8 * kPack)));

template <class Vector>
OPTIM_EXT_INLINE Vector read(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

// Rows stored as bf16; the other two storages are C++ types.
struct Bf16 {
  uint16_t bits;
};

// Two registers of doubles. Of a row of bf16 numbers they take the even and the odd ones: a register of them then
// becomes floats by one operation each, a shift or a mask.
struct TwoPacks {
  Doubles pack[2];
};

OPTIM_EXT_INLINE Doubles widen(const double* from) { return read<Doubles>(from); }

// The widening of floats, which compilers do not find by themselves, and a * b + c where the product is exact: rounded
// once or twice, it is the same then.
#if OPTIM_EXT_REGISTER_BYTES == 64
OPTIM_EXT_INLINE Doubles widen(const float* from) { return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(from)); }
OPTIM_EXT_INLINE TwoPacks widen_two(const Bf16* from) {
  const __m256i pairs = read<__m256i>(from);
  const __m256i even = _mm256_slli_epi32(pairs, 16), odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000));
  return {(Doubles)_mm512_cvtps_pd(_mm256_castsi256_ps(even)), (Doubles)_mm512_cvtps_pd(_mm256_castsi256_ps(odd))};
}
OPTIM_EXT_INLINE Doubles add_exact_product(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#else
#if OPTIM_EXT_REGISTER_BYTES == 32
OPTIM_EXT_INLINE Doubles widen(const float* from) { return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(from)); }
OPTIM_EXT_INLINE TwoPacks widen_two(const Bf16* from) {
  const __m128i pairs = read<__m128i>(from);
  const __m128i even = _mm_slli_epi32(pairs, 16), odd = _mm_and_si128(pairs, _mm_set1_epi32(0xffff0000));
  return {(Doubles)_mm256_cvtps_pd(_mm_castsi128_ps(even)), (Doubles)_mm256_cvtps_pd(_mm_castsi128_ps(odd))};
}
#else
typedef float Floats __attribute__((vector_size(4 * kPack)));
OPTIM_EXT_INLINE Doubles widen(const float* from) { return __builtin_convertvector(read<Floats>(from), Doubles); }
OPTIM_EXT_INLINE TwoPacks widen_two(const Bf16* from) {
  float floats[2 * kPack];
  for (int i = 0; i < kPack; ++i) {
    floats[i] = widen_bf16(from[2 * i].bits);
    floats[kPack + i] = widen_bf16(from[2 * i + 1].bits);
  }
  return {widen(floats), widen(floats + kPack)};
}
#endif
OPTIM_EXT_INLINE Doubles add_exact_product(Doubles a, Doubles b, Doubles c) { return c + a * b; }
#endif

template <class T>
OPTIM_EXT_INLINE TwoPacks widen_two(const T* from) {
  return {widen(from), widen(from + kPack)};
}

// The even elements of two registers and the odd ones, and back.
#if OPTIM_EXT_REGISTER_BYTES == 64
#define OPTIM_EXT_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define OPTIM_EXT_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define OPTIM_EXT_FIRST_HALF 0, 8, 1, 9, 2, 10, 3, 11
#define OPTIM_EXT_SECOND_HALF 4, 12, 5, 13, 6, 14, 7, 15
#elif OPTIM_EXT_REGISTER_BYTES == 32
#define OPTIM_EXT_EVEN 0, 2, 4, 6
#define OPTIM_EXT_ODD 1, 3, 5, 7
#define OPTIM_EXT_FIRST_HALF 0, 4, 1, 5
#define OPTIM_EXT_SECOND_HALF 2, 6, 3, 7
#else
#define OPTIM_EXT_EVEN 0, 2
#define OPTIM_EXT_ODD 1, 3
#define OPTIM_EXT_FIRST_HALF 0, 2
#define OPTIM_EXT_SECOND_HALF 1, 3
#endif
#if defined(__clang__)
#define OPTIM_EXT_SHUFFLE(x, ...) __builtin_shufflevector(x.pack[0], x.pack[1], __VA_ARGS__)
#else
typedef int64_t Places __attribute__((vector_size(8 * kPack)));
#define OPTIM_EXT_SHUFFLE(x, ...) __builtin_shuffle(x.pack[0], x.pack[1], Places{__VA_ARGS__})
#endif
OPTIM_EXT_INLINE TwoPacks split(const TwoPacks& x) {
  return {OPTIM_EXT_SHUFFLE(x, OPTIM_EXT_EVEN), OPTIM_EXT_SHUFFLE(x, OPTIM_EXT_ODD)};
}
OPTIM_EXT_INLINE TwoPacks joined(const TwoPacks& x) {
  return {OPTIM_EXT_SHUFFLE(x, OPTIM_EXT_FIRST_HALF), OPTIM_EXT_SHUFFLE(x, OPTIM_EXT_SECOND_HALF)};
}
#undef OPTIM_EXT_SHUFFLE
#undef OPTIM_EXT_EVEN
#undef OPTIM_EXT_ODD
#undef OPTIM_EXT_FIRST_HALF
#undef OPTIM_EXT_SECOND_HALF

template <class Row>
constexpr bool kIsSplit = false;
template <>
constexpr bool kIsSplit<Bf16> = true;

// Two registers of a vector in the order in which rows of that type come.
template <class Row, class T>
OPTIM_EXT_INLINE TwoPacks widen_two_for(const T* from) {
  if constexpr (kIsSplit<Row> && !kIsSplit<T>) {
    return split(widen_two(from));
  } else {
    return widen_two(from);
  }
}

// Which of a row's sums register h of two belongs to, when p registers came before. The lanes are then the same for
// every instruction set: element i of sixteen belongs to lane i % 8, or, where the row is split, to lane i / 2.
template <class Row>
constexpr int sum_of(int p, int h) {
  return kIsSplit<Row> ? p / 2 : (p + h) % kPacks;
}

// Adds a product of numbers of these types. That of two floats has at most 48 bits and is exact in double.
template <class A, class B>
OPTIM_EXT_INLINE Doubles add_product(Doubles a, Doubles b, Doubles c) {
  if constexpr (sizeof(A) <= sizeof(float) && sizeof(B) <= sizeof(float)) {
    return add_exact_product(a, b, c);
  } else {
    return c + a * b;
  }
}

OPTIM_EXT_INLINE double as_double(double value) { return value; }
OPTIM_EXT_INLINE double as_double(float value) { return value; }
OPTIM_EXT_INLINE double as_double(Bf16 value) { return widen_bf16(value.bits); }

template <class T>
OPTIM_EXT_INLINE void store(T* to, double value) {
  *to = static_cast<T>(value);
}
OPTIM_EXT_INLINE void store(Bf16* to, double value) { to->bits = narrow_bf16(static_cast<float>(value)); }

OPTIM_EXT_INLINE Doubles all_lanes(double value) { return value - Doubles{}; }

struct Lanes {
  Doubles pack[kPacks];

  OPTIM_EXT_INLINE void clear() {
    for (int p = 0; p < kPacks; ++p) pack[p] = Doubles{};
  }
  OPTIM_EXT_INLINE double lane(int i) const { return pack[i / kPack][i % kPack]; }
  OPTIM_EXT_INLINE double sum() const {
    return ((lane(0) + lane(4)) + (lane(2) + lane(6))) + ((lane(1) + lane(5)) + (lane(3) + lane(7)));
  }
};

constexpr int kUnroll = 2 * kHistoryLanes;  // elements at a time

// Elements of a tile that do not fill the lanes, in a buffer that does, padded with zeros.
template <class T>
OPTIM_EXT_INLINE const T* padded(const T* from, int64_t n, T* buffer) {
  for (int i = 0; i < kUnroll; ++i) buffer[i] = i < n ? from[i] : T{};
  return buffer;
}

template <class T>
struct Rest {
  T element[kUnroll];
};

}  // namespace

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
