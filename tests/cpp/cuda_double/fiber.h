// A function with a stack of its own, which runs where it left whenever the scheduler enters it.
#pragma once

#include <cstddef>

namespace optim_ext::device {

class Fiber {
 public:
  explicit Fiber(void (*entry)());  // which never returns
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void enter();         // returns when the fiber leaves
  static void leave();  // back to the scheduler
  void* who() const { return who_; }
  static void* scheduler() { return scheduler_who_; }

 private:
  struct Context;
  static void first();

  Context* context_;
  unsigned char* stack_;
  void (*entry_)();
  void* who_;  // for the race detector

  static Context* scheduler_context_;
  static Fiber* running_;
  static void* scheduler_who_;
};

}  // namespace optim_ext::device
