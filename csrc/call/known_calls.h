// Calls whose memory has been found sound, remembered by value.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace optim_ext::ops {

// What a call writes and reads, found sound, by value: a later one like it need not be looked at again.
struct KnownCall;

// Some of these. Whoever makes the same calls again and again, step after step, keeps them.
class KnownCalls {
 public:
  static constexpr size_t kMost = 8;
  using Known = std::shared_ptr<const KnownCall>;
  // Those of the caller, or of nobody where he keeps none.
  static KnownCalls& current();
  std::array<Known, kMost> all() const;
  // In place of one of them that says the same of what is written, or of the oldest.
  void remember(Known call, const KnownCall* outdated);

 private:
  mutable std::mutex mutex_;  // two threads may step one optimizer
  std::array<Known, kMost> calls_;
  size_t oldest_ = 0;
};

// While one of these lives, calls of this thread are remembered there, and not with those that nobody keeps.
class RemembersCalls {
 public:
  explicit RemembersCalls(KnownCalls& calls);
  ~RemembersCalls();
  RemembersCalls(const RemembersCalls&) = delete;

 private:
  KnownCalls* const before_;
};

// A set of addresses that is asked much more often than it is made.
class Addresses {
 public:
  explicit Addresses(const std::vector<const void*>& addresses)
      : slots_(std::bit_ceil(2 * addresses.size() + 1), nullptr) {
    for (const void* const address : addresses) *place_of(address) = address;
  }
  bool contains(const void* address) const {
    return address != nullptr && *const_cast<Addresses*>(this)->place_of(address) == address;
  }

 private:
  const void** place_of(const void* address) {
    const size_t mask = slots_.size() - 1;
    size_t i = (reinterpret_cast<uintptr_t>(address) >> 4) * 0x9e3779b97f4a7c15u >> 20 & mask;
    while (slots_[i] != nullptr && slots_[i] != address) i = (i + 1) & mask;
    return &slots_[i];
  }
  std::vector<const void*> slots_;
};

}  // namespace optim_ext::ops
