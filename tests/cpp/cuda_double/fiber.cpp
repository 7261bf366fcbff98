#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "race.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace optim_ext::device {

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;

// The address sanitizer has to know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void start_switch(const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(nullptr, stack, bytes); }
void start_switch_back() { start_switch(scheduler_stack, scheduler_stack_bytes); }
void finish_switch() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
void finish_switch_back() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
#else
void start_switch(const void*, size_t) {}
void start_switch_back() {}
void finish_switch() {}
void finish_switch_back() {}
#endif

}  // namespace

#if defined(__x86_64__)

// ucontext would make two system calls per switch. What the calling convention lets a function keep is pushed on one
// stack and popped from the other.
extern "C" void optim_ext_switch_stack(void** save, void* to);
asm(R"(
.text
.globl optim_ext_switch_stack
.type optim_ext_switch_stack,@function
optim_ext_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size optim_ext_switch_stack,.-optim_ext_switch_stack
)");

struct Fiber::Context {
  void* top = nullptr;

  void prepare(unsigned char* stack, void (*first)()) {
    void** at = reinterpret_cast<void**>(stack + kStack - 64);
    *--at = nullptr;  // a return address, so that the first function finds its stack aligned as after a call
    *--at = reinterpret_cast<void*>(first);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    top = at;
  }
  static void change(Context& from, Context& to) { optim_ext_switch_stack(&from.top, to.top); }
};

#else

struct Fiber::Context {
  ucontext_t state;

  void prepare(unsigned char* stack, void (*first)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = kStack;
    state.uc_link = nullptr;
    makecontext(&state, first, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};

#endif

Fiber::Context* Fiber::scheduler_context_ = new Context;
Fiber* Fiber::running_ = nullptr;
void* Fiber::scheduler_who_ = nullptr;

Fiber::Fiber(void (*entry)()) : context_(new Context), entry_(entry), who_(race::make()) {
  void* const memory =
      mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
    std::perror("memory for a stack");
    std::exit(70);
  }
  stack_ = static_cast<unsigned char*>(memory) + kGuard;
  context_->prepare(stack_, &Fiber::first);
}

void Fiber::first() {
  finish_switch();
  running_->entry_();
  std::abort();
}

void Fiber::enter() {
  running_ = this;
  scheduler_who_ = race::current();
  race::become(who_);
  start_switch(stack_, kStack);
  Context::change(*scheduler_context_, *context_);
  finish_switch_back();
}

void Fiber::leave() {
  Fiber& self = *running_;
  race::become(scheduler_who_);
  start_switch_back();
  Context::change(*self.context_, *scheduler_context_);
  finish_switch();
}

}  // namespace optim_ext::device
