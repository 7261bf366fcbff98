#include "handover.h"

namespace optim_ext::ops {

bool Prepared::fits(const CallSpec& spec, unsigned used_here, unsigned updates_here) const {
  return op == spec.op && used == used_here && updates == updates_here && !spec.controls.grad_scale &&
         spec.controls.averages.empty() && spec.controls.companions.empty();
}

namespace {
thread_local Handover* current_handover = nullptr;
}  // namespace

Handover::Handover(Kind kind, Prepared& prepared) : kind(kind), prepared(prepared), before_(current_handover) {
  current_handover = this;
}
Handover::~Handover() { current_handover = before_; }
Handover* Handover::current() { return current_handover; }

}  // namespace optim_ext::ops
