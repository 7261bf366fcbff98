// How elements get from memory to tiles and back: in their own order, converted to and from the type of the arithmetic.
// Compiled once per instruction set.

#include "moves-inl.h"

namespace optim_ext::cpu::OPTIM_EXT_ISA {

namespace {

// Elements that fill a tile in one go: `runs` runs of `length` elements, which lie one behind the other in the tile.
struct Block {
  int64_t runs, length;
  int64_t run_stride, stride;  // in memory, from run to run and from element to element
};

// Calls visit(place in the tile, offset in memory) for all of them, with the longer loop inside: rows of a few elements
// would otherwise cost more to begin than to read. Elements that follow each other have a loop that knows it.
template <class Visit>
OPTIM_EXT_INLINE void over_block(const Block& given, const Visit& visit) {
  const Block block = given;
  if (block.runs > block.length) {
    for (int64_t e = 0; e < block.length; ++e) {
      OPTIM_EXT_FOR(r, block.runs) visit(r * block.length + e, r * block.run_stride + e * block.stride);
    }
  } else if (block.stride == 1) {
    for (int64_t r = 0; r < block.runs; ++r) {
      OPTIM_EXT_FOR(e, block.length) visit(r * block.length + e, r * block.run_stride + e);
    }
  } else {
    for (int64_t r = 0; r < block.runs; ++r) {
      OPTIM_EXT_FOR(e, block.length) visit(r * block.length + e, r * block.run_stride + e * block.stride);
    }
  }
}

// Whether runs lie side by side, element by element, as those of a transposed matrix do, and are enough to be turned.
template <class T>
OPTIM_EXT_INLINE bool is_transposed(const Block& block) {
  return block.run_stride == 1 && block.stride != 1 && block.runs >= Square<T>::kRows &&
         block.length >= Square<T>::kRows;
}

// Runs of few elements, of which none needs converting, in two moves each that may overlap: kHalf bytes from either
// end.
template <int kHalf, class T>
OPTIM_EXT_INLINE void move_runs(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t runs,
                                int64_t length) {
  const int64_t second = length - kHalf / static_cast<int64_t>(sizeof(T));
  for (int64_t r = 0; r < runs; ++r, from += from_step, to += to_step) {
    __builtin_memcpy(to, from, kHalf);
    __builtin_memcpy(to + second, from + second, kHalf);
  }
}

// Whether move_short_runs() has moved them.
template <class T>
OPTIM_EXT_INLINE bool move_short_runs(const T* from, int64_t from_step, T* to, int64_t to_step, const Block& block) {
  const int64_t bytes = block.length * static_cast<int64_t>(sizeof(T));
  if (block.stride != 1 || block.runs < 2 || bytes < 8 || bytes > 64) return false;
  if (bytes >= 32) {
    move_runs<32>(from, from_step, to, to_step, block.runs, block.length);
  } else if (bytes >= 16) {
    move_runs<16>(from, from_step, to, to_step, block.runs, block.length);
  } else {
    move_runs<8>(from, from_step, to, to_step, block.runs, block.length);
  }
  return true;
}

template <class T, class V, class Convert>
OPTIM_EXT_INLINE void widen_block(const T* x, const Block& block, V* to, const Convert& wide) {
  if (block.stride == 0 && block.runs <= block.length) {  // each run is one element, as where a tensor is expanded
    for (int64_t r = 0; r < block.runs; ++r, to += block.length) {
      const V value = static_cast<V>(wide(x[r * block.run_stride]));
      OPTIM_EXT_FOR(e, block.length) to[e] = value;
    }
    return;
  }
  if constexpr (std::is_same_v<T, V>) {
    if (is_transposed<T>(block)) return transpose(x, block.stride, to, block.length, block.runs, block.length);
    if (move_short_runs(x, block.run_stride, to, block.length, block)) return;
  }
  over_block(block, [=](int64_t i, int64_t at) __attribute__((always_inline)) { to[i] = static_cast<V>(wide(x[at])); });
}

template <class T, class V, class Convert>
OPTIM_EXT_INLINE void narrow_block(const V* from, T* x, const Block& block, const Convert& narrowed) {
  if constexpr (std::is_same_v<T, V>) {
    if (is_transposed<T>(block)) return transpose(from, block.length, x, block.stride, block.length, block.runs);
    if (move_short_runs(from, block.length, x, block.run_stride, block)) return;
  }
  over_block(block, [=](int64_t i, int64_t at) __attribute__((always_inline)) { x[at] = narrowed(from[i]); });
}

// The conversions of convert.h for as many bf16 numbers in a row as fill registers; returns how many. Compilers do not
// find these instructions.
template <class V>
OPTIM_EXT_INLINE int64_t widen_bf16s(const uint16_t*, V*, int64_t) {
  return 0;
}
template <class V>
OPTIM_EXT_INLINE int64_t narrow_bf16s(const V*, uint16_t*, int64_t) {
  return 0;
}
#if OPTIM_EXT_REGISTER_BYTES == 64
OPTIM_EXT_INLINE int64_t widen_bf16s(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    _mm512_storeu_si512(to + i, _mm512_slli_epi32(halves, 16));
  }
  return i;
}
OPTIM_EXT_INLINE int64_t narrow_bf16s(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 value = _mm512_loadu_ps(from + i);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(rounded));
  }
  return i;
}
#elif OPTIM_EXT_REGISTER_BYTES == 32
OPTIM_EXT_INLINE int64_t widen_bf16s(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)));
  }
  return i;
}
OPTIM_EXT_INLINE int64_t narrow_bf16s(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256i rounded[2];
    for (int h = 0; h < 2; ++h) {
      const __m256 value = _mm256_loadu_ps(from + i + 8 * h);
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
      const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      rounded[h] = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    }
    // Packing works on each half of the registers on its own: put the quarters back in order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), packed);
  }
  return i;
}
#endif

template <class V>
OPTIM_EXT_INLINE void widen(const void* from, Storage storage, const Block& block, V* to) {
  const auto* const halves = static_cast<const uint16_t*>(from);
  switch (storage) {
    case Storage::f32: return widen_block(static_cast<const float*>(from), block, to, [](float x) { return x; });
    case Storage::f64: return widen_block(static_cast<const double*>(from), block, to, [](double x) { return x; });
    case Storage::bf16: {
      const auto wide = [](uint16_t x) { return widen_bf16(x); };
      if (block.runs != 1 || block.stride != 1) return widen_block(halves, block, to, wide);
      const int64_t done = widen_bf16s(halves, to, block.length);
      return widen_block(halves + done, {1, block.length - done, 1, 1}, to + done, wide);
    }
    case Storage::f16: return widen_block(halves, block, to, [](uint16_t x) { return widen_f16(x); });
    case Storage::q8: return;  // opened by companions-inl.h
  }
}

template <class V>
OPTIM_EXT_INLINE void narrow(const V* from, void* to, Storage storage, const Block& block) {
  auto* const halves = static_cast<uint16_t*>(to);
  switch (storage) {
    case Storage::f32:
      return narrow_block(from, static_cast<float*>(to), block, [](V x) { return static_cast<float>(x); });
    case Storage::f64:
      return narrow_block(from, static_cast<double*>(to), block, [](V x) { return static_cast<double>(x); });
    case Storage::bf16: {
      const auto narrowed = [](V x) { return narrow_bf16(static_cast<float>(x)); };
      if (block.runs != 1 || block.stride != 1) return narrow_block(from, halves, block, narrowed);
      const int64_t done = narrow_bf16s(from, halves, block.length);
      return narrow_block(from + done, halves + done, {1, block.length - done, 1, 1}, narrowed);
    }
    case Storage::f16: return narrow_block(from, halves, block, [](V x) { return narrow_f16(static_cast<float>(x)); });
    case Storage::q8: return;  // closed by companions-inl.h
  }
}

}  // namespace

}  // namespace optim_ext::cpu::OPTIM_EXT_ISA
