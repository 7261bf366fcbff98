// Calls whose members share memory, taken one turn after the other.
#pragma once

#include <functional>

#include "../call/call.h"
#include "../call/turns.h"
#include "whole_norms.h"

namespace optim_ext::ops {

// The turns of a call, all of them checked before the first one writes. Averages follow when all parameters are
// stepped.
void step_in_turns(const MembersInTurn& turns, const char* op, const StepControls& controls, TensorList params,
                   const std::function<void(const StepControls&, const Members&)>& body);

// Calls body(controls, members), and where the members overlap, once for each of their turns.
template <class Body>
void in_turns(const char* op, const StepControls& controls, TensorList params, const Body& body) {
  MembersInTurn turns;
  try {
    return body(controls, Members());
  } catch (const InTurn& overlap) {
    if (WholeNorms::current() != nullptr) throw;  // the norms of a turn would be those before the turns before it
    turns = overlap.turns;
  }
  step_in_turns(turns, op, controls, params, body);
}

}  // namespace optim_ext::ops
