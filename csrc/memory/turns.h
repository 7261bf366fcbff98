// In which order the members of a call may be worked on, when some of them share memory.
#pragma once

#include "extent.h"

namespace optim_ext::memory {

// Memory that one member of a call reads or writes.
struct Access {
  Extent extent;
  int32_t member;         // its place in the call's lists
  int32_t list;           // which of the lists, as the caller numbers them
  bool in_place = false;  // read element by element where the member writes: the order of elements does not matter
  bool operator==(const Access&) const = default;
};

// Members whose memory is disjoint are worked on at once. Of two that overlap, or may, the one that comes first in the
// lists has the earlier turn, so that the outcome is that of working on one member after the other.
struct Turns {
  std::vector<int32_t> of_member;  // empty: all members have the same turn
  // What no order makes right: a write that overlaps another one of its own member, a read that overlaps a write of its
  // own member, and a read of what an earlier member is known to write. Places in the lists of accesses, else -1.
  int64_t bad_write = -1, bad_read = -1, late_read = -1;
};

// More pairs than this are not listed: every member then has a turn of its own.
constexpr size_t kMostPairs = size_t{1} << 20;

Turns turns_of(const std::vector<Access>& writes, const std::vector<Access>& reads, int64_t members);

}  // namespace optim_ext::memory
