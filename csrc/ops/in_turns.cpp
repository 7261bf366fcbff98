#include "in_turns.h"

#include "run_average.h"

namespace optim_ext::ops {

void step_in_turns(const MembersInTurn& turns, const char* op, const StepControls& controls, TensorList params,
                   const std::function<void(const StepControls&, const Members&)>& body) {
  const StepControls of_turn = controls.without_average();
  const auto take_all = [&] {
    const OverlapsChecked checked;
    for (const std::vector<int64_t>& members : turns) {
      try {
        body(of_turn, Members(members));
      } catch (const BadInput& bad) {
        if (bad.index < 0) throw;
        throw BadInput(op, bad.list, members[bad.index], bad.problem);
      }
    }
  };
  const auto average = [&](bool check_only) {
    if (!controls.averages.empty())
      run_average(controls.averages, params, *controls.average_weight, controls.found_inf, check_only);
  };
  {
    const CheckOnly checking;
    take_all();
  }
  average(true);
  if (CheckOnly::active()) return;
  take_all();
  average(false);
}

}  // namespace optim_ext::ops
