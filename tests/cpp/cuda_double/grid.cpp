// The double's core: one grid at a time, its threads on fibers, one to three of its blocks under way. All decisions are
// taken here, between two threads' turns; a thread that needs something of the others says so and leaves.
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "../check.h"
#include "core.h"
#include "device/kernel.h"
#include "fiber.h"
#include "race.h"

namespace optim_ext::device {

Position position;

namespace {

constexpr unsigned kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xcb;  // what shared memory holds before a block writes to it

enum class Wish { run, shared, barrier, shuffle, nothing };

struct Block;

struct Thread {
  explicit Thread(void (*entry)()) : fiber(entry) {}
  Fiber fiber;
  Block* block = nullptr;
  unsigned number = 0;
  Wish wish = Wish::nothing;
  Where where;
  unsigned barriers = 0;
  // A shuffle's:
  unsigned mask = 0, source = 0;
  double value = 0.0, result = 0.0;
  // A shared variable's:
  const void* tag = nullptr;
  size_t bytes = 0, alignment = 0;
  void* memory = nullptr;
};

struct Warp {
  unsigned arrived = 0;  // lanes of the mask that `first` gave
  Thread* first = nullptr;
};

struct Block {
  unsigned x = 0, y = 0;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  size_t alive = 0, waiting = 0;
  Thread* first_at_barrier = nullptr;
  std::map<const void*, void*> shared;
  race::Handover barrier[2];  // by turns: a thread may be at the next barrier before another has left this one
  race::Handover fenced;
  bool counted = false;  // an atomic operation of the block is done
};

struct Running {
  const Launch& launch;
  race::Handover start, end;
};

Random random_numbers{1};
Running* running = nullptr;
Thread* current = nullptr;
race::Handover fences;
std::vector<Thread*>& idle = *new std::vector<Thread*>;  // kept to the end, with their stacks

}  // namespace

void refuse(const char* format, ...) {
  race::become(running && Fiber::scheduler() ? Fiber::scheduler() : race::current());
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "the double refuses: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  if (running) std::fprintf(stderr, "  in a kernel launched by %s\n", running->launch.kernel);
  std::fflush(stderr);
  _exit(70);
}

namespace {

const char* name_of(const Where& where) {
  const char* const slash = std::strrchr(where.file_name(), '/');
  return slash ? slash + 1 : where.file_name();
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

void run_thread() {
  for (;;) {
    running->start.acquire();
    running->launch.invoke(running->launch.arguments.get());
    running->end.release();
    current->wish = Wish::nothing;
    Fiber::leave();
  }
}

void wish(Wish what, const Where& where) {
  current->wish = what;
  current->where = where;
  Fiber::leave();
}

class Scheduler {
 public:
  explicit Scheduler(Running& work)
      : running_(work), grid_(work.launch.grid), order_(static_cast<size_t>(grid_.x * grid_.y)) {
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = i;
    const uint64_t how = random_numbers.bits() % 4;
    if (how == 1) std::reverse(order_.begin(), order_.end());
    for (size_t i = how >= 2 ? order_.size() : 0; i > 1; --i)
      std::swap(order_[i - 1], order_[random_numbers.bits() % i]);
    pick_ = static_cast<unsigned>(random_numbers.bits() % 4);
    resident_ = 1 + random_numbers.bits() % 3;
  }

  void run() {
    running_.start.release();
    while (blocks_.size() < resident_ && next_ < order_.size()) start_block();
    while (!blocks_.empty()) {
      if (ready_.empty()) report_deadlock();
      take_turn(*next_thread());
    }
    running_.end.acquire();
    for (void* memory : shared_) std::free(memory);
  }

 private:
  void start_block() {
    const size_t index = order_[next_++];
    auto block = std::make_unique<Block>();
    block->x = static_cast<unsigned>(index % static_cast<size_t>(grid_.x));
    block->y = static_cast<unsigned>(index / static_cast<size_t>(grid_.x));
    block->alive = static_cast<size_t>(running_.launch.threads);
    block->warps.resize((block->alive + kWarp - 1) / kWarp);
    for (unsigned number = 0; number < block->alive; ++number) {
      Thread* thread = idle.empty() ? new Thread(&run_thread) : idle.back();
      if (!idle.empty()) idle.pop_back();
      thread->block = block.get();
      thread->number = number;
      thread->barriers = 0;
      block->threads.push_back(thread);
      make_ready(thread);
    }
    blocks_.push_back(std::move(block));
  }

  void make_ready(Thread* thread) {
    thread->wish = Wish::run;
    ready_.push_back(thread);
  }

  Thread* next_thread() {
    if (pick_ >= 2) std::swap(ready_.back(), ready_[random_numbers.bits() % ready_.size()]);
    Thread* const thread = pick_ == 0 ? ready_.front() : ready_.back();
    pick_ == 0 ? ready_.pop_front() : ready_.pop_back();
    return thread;
  }

  void take_turn(Thread& thread) {
    Block& block = *thread.block;
    current = &thread;
    position = {thread.number, block.x, block.y, static_cast<unsigned>(grid_.y)};
    for (thread.fiber.enter(); thread.wish == Wish::shared; thread.fiber.enter()) give_shared(thread);
    switch (thread.wish) {
      case Wish::barrier: return arrive_at_barrier(thread, block);
      case Wish::shuffle: return arrive_at_shuffle(thread, block);
      case Wish::nothing: return end_thread(thread, block);
      default: ready_.push_back(&thread);
    }
  }

  // Memory is taken and given back here, as the detector would take it for memory of the thread that asks first.
  void give_shared(Thread& thread) {
    void*& memory = thread.block->shared[thread.tag];
    if (!memory) {
      const size_t bytes = (thread.bytes + 63) / 64 * 64;
      memory = std::aligned_alloc(std::max<size_t>(thread.alignment, 64), bytes);
      shared_.push_back(memory);
      for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(memory)[i] = kPoison;
      allocated_.release();
    }
    thread.memory = memory;
    race::become(thread.fiber.who());
    allocated_.acquire();
    race::become(Fiber::scheduler());
  }

  void arrive_at_barrier(Thread& thread, Block& block) {
    if (block.alive != block.threads.size()) {
      refuse("a barrier after some threads left, %s:%u", name_of(thread.where), thread.where.line());
    }
    if (block.waiting == 0) block.first_at_barrier = &thread;
    const Where& others = block.first_at_barrier->where;
    if (!same_place(others, thread.where)) {
      refuse("threads of one block wait at different barriers, %s:%u and %s:%u", name_of(others), others.line(),
             name_of(thread.where), thread.where.line());
    }
    if (++block.waiting < block.alive) return;
    block.waiting = 0;
    for (Thread* other : block.threads) make_ready(other);
  }

  void arrive_at_shuffle(Thread& thread, Block& block) {
    Warp& warp = block.warps[thread.number / kWarp];
    const unsigned lane = thread.number % kWarp, mask = thread.mask;
    Thread** const lanes = &block.threads[thread.number - lane];
    const unsigned there =
        static_cast<unsigned>(std::min<size_t>(kWarp, block.threads.size() - (thread.number - lane)));
    const auto complain = [&](const char* what, unsigned which) {
      refuse("%s, lane %u, %s:%u", what, which, name_of(thread.where), thread.where.line());
    };
    if (!(mask >> lane & 1u)) complain("a lane shuffles that is not in its own mask", lane);
    for (unsigned l = 0; l < kWarp && warp.arrived == 0; ++l) {
      if (!(mask >> l & 1u)) continue;
      if (l >= there) complain("a shuffle's mask has a lane that does not exist", l);
      if (lanes[l]->wish == Wish::nothing) complain("a shuffle's mask has a lane that has left", l);
    }
    if (warp.arrived == 0) warp.first = &thread;
    if (warp.first->mask != mask) complain("lanes shuffle with different masks", lane);
    if (!same_place(warp.first->where, thread.where)) complain("lanes shuffle in different places", lane);
    warp.arrived |= 1u << lane;
    if (warp.arrived != mask) return;
    warp.arrived = 0;
    for (unsigned l = 0; l < there; ++l) {
      if (!(mask >> l & 1u)) continue;
      if (!(mask >> lanes[l]->source & 1u))
        complain("a lane is asked that takes no part in the shuffle", lanes[l]->source);
      lanes[l]->result = lanes[lanes[l]->source]->value;
    }
    for (unsigned l = 0; l < there; ++l) {
      if (mask >> l & 1u) make_ready(lanes[l]);
    }
  }

  void end_thread(Thread& thread, Block& block) {
    if (--block.alive > 0) {
      if (block.waiting > 0) {
        const Where& where = block.first_at_barrier->where;
        refuse("thread %u left while others wait at the barrier %s:%u", thread.number, name_of(where), where.line());
      }
      refuse_if_others_shuffle(thread, block);
      return;
    }
    idle.insert(idle.end(), block.threads.begin(), block.threads.end());
    std::erase_if(blocks_, [&](const auto& other) { return other.get() == &block; });
    if (next_ < order_.size()) start_block();
  }

  static void refuse_if_others_shuffle(const Thread& thread, const Block& block) {
    const unsigned lane = thread.number % kWarp, arrived = block.warps[thread.number / kWarp].arrived;
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!(arrived >> l & 1u)) continue;
      const Thread& other = *block.threads[thread.number - lane + l];
      if (!(other.mask >> lane & 1u)) continue;
      refuse("lane %u left while others of its mask shuffle, %s:%u", lane, name_of(other.where), other.where.line());
    }
  }

  [[noreturn]] void report_deadlock() {
    int told = 0;
    for (const auto& block : blocks_) {
      for (const Thread* thread : block->threads) {
        if (thread->wish == Wish::nothing || ++told > 8) continue;
        std::fprintf(stderr, "  block %u, thread %u waits at a %s, %s:%u\n", block->x, thread->number,
                     thread->wish == Wish::barrier ? "barrier" : "shuffle", name_of(thread->where),
                     thread->where.line());
      }
    }
    refuse("deadlock: no thread can go on");
  }

  Running& running_;
  const Grid& grid_;
  std::vector<size_t> order_;
  size_t next_ = 0, resident_;
  unsigned pick_;  // 0: the thread that is ready for longest, 1: for shortest, else any
  std::vector<std::unique_ptr<Block>> blocks_;
  std::deque<Thread*> ready_;
  std::vector<void*> shared_;
  race::Handover allocated_;
};

}  // namespace

void set_seed(uint64_t seed) { random_numbers.state = seed; }

void find_races(bool on) { race::is_on = on; }

void run_grid(const Launch& launch) {
  if (running) refuse("a launch inside a kernel: %s", launch.kernel);
  Running grid{launch, {}, {}};
  running = &grid;
  const Grid& size = launch.grid;
  if (size.x == 0 || size.y == 0) refuse("a grid without blocks");
  if (!fits(size)) {
    refuse("a grid of %lld x %lld blocks, more than %lld x %lld", static_cast<long long>(size.x),
           static_cast<long long>(size.y), static_cast<long long>(kMaxBlocksX), static_cast<long long>(kMaxBlocksY));
  }
  if (launch.threads < 1 || launch.threads > kMaxThreads) refuse("a block of %d threads", launch.threads);
  if (launch.argument_bytes > kMaxArgumentBytes) {
    refuse("%lld bytes of arguments, more than %lld", static_cast<long long>(launch.argument_bytes),
           static_cast<long long>(kMaxArgumentBytes));
  }
  Scheduler(grid).run();
  running = nullptr;
  current = nullptr;
}

void barrier(const Where& where) {
  Thread& self = *current;
  race::Handover& handover = self.block->barrier[self.barriers++ % 2];
  handover.release();
  wish(Wish::barrier, where);
  handover.acquire();
}

namespace {

// Gives a value and takes that of lane `source`. Whole numbers of 32 bits are doubles, too.
double shuffle(unsigned mask, double value, unsigned source, const Where& where) {
  Thread& self = *current;
  self.mask = mask;
  self.value = value;
  self.source = source;
  wish(Wish::shuffle, where);
  return self.result;
}

unsigned own_lane() { return current->number % kWarp; }

}  // namespace

double shuffle_down(unsigned mask, double value, int apart, int width, const Where& where) {
  const unsigned lane = own_lane(), in_group = lane % static_cast<unsigned>(width);
  const bool is_there = in_group + static_cast<unsigned>(apart) < static_cast<unsigned>(width);
  return shuffle(mask, value, is_there ? lane + static_cast<unsigned>(apart) : lane, where);
}

uint32_t shuffle_from(unsigned mask, uint32_t value, int lane, int width, const Where& where) {
  const unsigned in_group = own_lane() % static_cast<unsigned>(width);
  return static_cast<uint32_t>(shuffle(mask, value, own_lane() - in_group + static_cast<unsigned>(lane), where));
}

uint32_t shuffle_xor(unsigned mask, uint32_t value, int lanes, const Where& where) {
  return static_cast<uint32_t>(shuffle(mask, value, own_lane() ^ static_cast<unsigned>(lanes), where));
}

// Orders what came before it through an atomic operation of this block that follows it, and what comes after it where
// an atomic operation of this block came before.
void fence() {
  Block& block = *current->block;
  block.fenced.release();
  if (block.counted) fences.acquire();
  wish(Wish::run, Where::current());
}

void before_atomic() {
  static void* const carrier = race::make();  // takes what was fenced to the others, and nothing else of this thread
  wish(Wish::run, Where::current());
  Thread& self = *current;
  race::become(carrier);
  self.block->fenced.acquire();
  fences.release();
  race::become(self.fiber.who());
  self.block->counted = true;
}

void* shared_memory(const void* tag, size_t bytes, size_t alignment) {
  Thread& self = *current;
  self.tag = tag;
  self.bytes = bytes;
  self.alignment = alignment;
  wish(Wish::shared, Where::current());
  return self.memory;
}

}  // namespace optim_ext::device
