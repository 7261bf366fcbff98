// The memory limit of an optimizer step: a bare loop that reads one stream (the gradient), reads and writes back
// `updated` others (the parameter and its state), and computes nothing. memory_limit.py compiles and calls it.
//
// It walks the very tensors of the optimizer and stores back the values it loaded, so the memory, its pages and its
// order are the step's own, and the tensors are unchanged afterwards.

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

// The widest vector of the instruction set it is compiled for. An asm statement that claims to change it keeps the compiler from dropping the
// load or the store; it stands for no instruction.
typedef char Vector __attribute__((vector_size(__BIGGEST_ALIGNMENT__), aligned(1), may_alias));
#if defined(__x86_64__)
#define OPAQUE(v) asm volatile("" : "+v"(v))
#else
#define OPAQUE(v) asm volatile("" : "+w"(v))
#endif

template <int kUpdated>
void walk(char* const* streams, int64_t begin, int64_t end) {
  const char* gradient = streams[0];
  char* updated[kUpdated + 1];
  for (int k = 0; k < kUpdated; ++k) updated[k] = streams[1 + k];
  constexpr int64_t kStep = sizeof(Vector);
  for (int64_t i = begin; i + kStep <= end; i += kStep) {
    Vector read = *reinterpret_cast<const Vector*>(gradient + i);
    OPAQUE(read);
#pragma GCC unroll 8
    for (int k = 0; k < kUpdated; ++k) {
      Vector* place = reinterpret_cast<Vector*>(updated[k] + i);
      Vector value = *place;
      OPAQUE(value);
      *place = value;
    }
  }
}

}  // namespace

// `streams`: for each tensor the gradient's address, then those of its `updated` other operands, all of bytes[tensor]
// bytes. `threads` equal shares of the concatenation of all tensors. Returns 0, or 1 for an unsupported `updated`.
extern "C" int walk_memory(int64_t tensors, int updated, char* const* streams, const int64_t* bytes, int threads) {
  void (*const walks[])(char* const*, int64_t, int64_t) = {walk<0>, walk<1>, walk<2>, walk<3>, walk<4>, walk<5>};
  if (updated < 0 || updated > 5) return 1;
  int64_t total = 0;
  for (int64_t t = 0; t < tensors; ++t) total += bytes[t];
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t first = total / count * id, last = id + 1 == count ? total : total / count * (id + 1);
    int64_t start = 0;
    for (int64_t t = 0; t < tensors; start += bytes[t++]) {
      const int64_t begin = std::max<int64_t>(first - start, 0), end = std::min(last - start, bytes[t]);
      if (begin < end) walks[updated](streams + t * (1 + updated), begin, end);
    }
  }
  return 0;
}

// Reads each of `count` arrays of bytes[i] bytes, its threads side by side along it.
extern "C" void read_memory(int64_t count, char* const* arrays, const int64_t* bytes, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
    constexpr int64_t kStep = sizeof(Vector);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t at = bytes[i] / all * id; at + kStep <= bytes[i] / all * (id + 1); at += kStep) {
        Vector read = *reinterpret_cast<const Vector*>(arrays[i] + at);
        OPAQUE(read);
      }
    }
  }
}
