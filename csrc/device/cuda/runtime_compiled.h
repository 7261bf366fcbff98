// What the compiler for units that come into being while a process runs (NVRTC) does without, where other compilers
// have a standard library and GCC's built-in functions: no more than kernels of one rule ask for.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
static_assert(sizeof(int64_t) == 8 && sizeof(uintptr_t) == sizeof(void*));

#define INT32_MAX 2147483647
#define INT64_MAX 9223372036854775807L
#define __FLT_MAX__ 3.40282346638528859811704183484516925e+38F
#define __DBL_MAX__ 1.79769313486231570814527423731704357e+308

// Square roots are correctly rounded: --prec-sqrt=true, and always in double.
#define __builtin_sqrtf(x) ::sqrtf(x)
#define __builtin_sqrt(x) ::sqrt(x)
#define __builtin_fabsf(x) ::fabsf(x)
#define __builtin_fabs(x) ::fabs(x)
#define __builtin_inf() __builtin_bit_cast(double, 0x7ff0000000000000ull)
#define __builtin_nan(text) __builtin_bit_cast(double, 0x7ff8000000000000ull)
#define __builtin_popcount(x) ::optim_ext::device::bits_set(x)

namespace optim_ext::device {

constexpr int bits_set(unsigned x) {
  int count = 0;
  for (; x != 0; x &= x - 1) ++count;
  return count;
}

}  // namespace optim_ext::device

namespace std {

template <class T>
struct type_identity {
  using type = T;
};
template <class T>
using type_identity_t = typename type_identity<T>::type;

template <bool kCondition, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool kCondition, class T, class F>
using conditional_t = typename conditional<kCondition, T, F>::type;

template <class T, T... kValues>
struct integer_sequence {};
template <class T, int kCount, T... kValues>
struct sequence_up_to : sequence_up_to<T, kCount - 1, kCount - 1, kValues...> {};
template <class T, T... kValues>
struct sequence_up_to<T, 0, kValues...> {
  using type = integer_sequence<T, kValues...>;
};
template <class T, T kCount>
using make_integer_sequence = typename sequence_up_to<T, kCount>::type;

}  // namespace std
