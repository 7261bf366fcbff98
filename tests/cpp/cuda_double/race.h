// What the core tells the race detector (-fsanitize=thread, OPTIM_EXT_RACES) about fibers and the order between them.
// The core itself is compiled without it: what it does is the hardware's doing, not the kernels'.
#pragma once

#if defined(OPTIM_EXT_RACES)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace optim_ext::race {

// Whether it is told at all. Otherwise all fibers are one thread to it, and run much faster.
inline bool is_on = true;

// Somewhere that order is handed over: what a fiber did before release() is before what another does after acquire().
struct Handover {
  char address;
#if defined(OPTIM_EXT_RACES)
  void release() {
    if (is_on) __tsan_release(&address);
  }
  void acquire() {
    if (is_on) __tsan_acquire(&address);
  }
#else
  void release() {}
  void acquire() {}
#endif
};

// Who the detector takes the running code for. Switching orders nothing.
#if defined(OPTIM_EXT_RACES)
inline void* current() { return __tsan_get_current_fiber(); }
inline void* make() { return __tsan_create_fiber(0); }
inline void become(void* who) {
  if (is_on) __tsan_switch_to_fiber(who, 1);
}
#else
inline void* current() { return nullptr; }
inline void* make() { return nullptr; }
inline void become(void*) {}
#endif

}  // namespace optim_ext::race
