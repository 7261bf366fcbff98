#include "turns.h"

namespace optim_ext::ops {

namespace {
thread_local int checked_depth = 0;
}  // namespace

OverlapsChecked::OverlapsChecked() { ++checked_depth; }
OverlapsChecked::~OverlapsChecked() { --checked_depth; }
bool OverlapsChecked::active() { return checked_depth > 0; }

}  // namespace optim_ext::ops
