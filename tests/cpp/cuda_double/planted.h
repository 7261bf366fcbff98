// What the planted faults ask: whether theirs is the number that main() was given.
#pragma once

namespace optim_ext {
extern int planted_fault;
inline bool planted(int fault) { return planted_fault == fault; }
}  // namespace optim_ext
