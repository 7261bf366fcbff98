// The words of kernels on the double.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#define OPTIM_EXT_DEVICE inline
#define OPTIM_EXT_KERNEL(...) void
#define OPTIM_EXT_ARGUMENT(...) const __VA_ARGS__&
#define OPTIM_EXT_SHARED(name, ...) auto& name = ::optim_ext::device::shared<std::type_identity_t<__VA_ARGS__>>([] {})

namespace optim_ext::device {

using Where = std::source_location;

// The thread that runs.
struct Position {
  unsigned thread_x, block_x, block_y, blocks_y;
};
extern Position position;

inline unsigned thread_x() { return position.thread_x; }
inline unsigned block_x() { return position.block_x; }
inline unsigned block_y() { return position.block_y; }
inline unsigned blocks_y() { return position.blocks_y; }

void barrier(const Where& where = Where::current());
double shuffle_down(unsigned mask, double value, int apart, int width = 32, const Where& where = Where::current());
uint32_t shuffle_from(unsigned mask, uint32_t value, int lane, int width = 32, const Where& where = Where::current());
uint32_t shuffle_xor(unsigned mask, uint32_t value, int lanes, const Where& where = Where::current());
void fence();

// Lets others run before an atomic operation, and lets it carry on what its block has fenced.
void before_atomic();

template <class T>
T atomic_add(T* to, T value) {
  before_atomic();
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}

inline double load_past_l1(const double* from) { return *from; }

// Memory of the running thread's block, filled with 0xCB when the block asks for it first. Every place in the text that
// asks has a tag of its own.
void* shared_memory(const void* tag, size_t bytes, size_t alignment);

template <class T, class Place>
T& shared(Place) {
  static const char tag = 0;
  return *static_cast<T*>(shared_memory(&tag, sizeof(T), alignof(T)));
}

}  // namespace optim_ext::device
