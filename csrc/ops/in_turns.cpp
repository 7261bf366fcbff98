#include "in_turns.h"

#include "run_average.h"

namespace optim_ext::ops {

void step_in_turns(const MembersInTurn& turns, const Common& common, at::TensorList params,
                   const std::function<void(const Common&, const Members&)>& body) {
  const std::optional<at::Tensor> none;
  const Common without{common.op, common.grad_scale, common.found_inf, common.grad_factor, {}, none};
  const auto take_all = [&] {
    const OverlapsChecked checked;
    for (const std::vector<int64_t>& members : turns) {
      try {
        body(without, Members(members));
      } catch (const BadInput& bad) {
        if (bad.index < 0) throw;
        throw BadInput(common.op, bad.list, members[bad.index], bad.problem);
      }
    }
  };
  const auto average = [&](bool check_only) {
    if (!common.averages.empty())
      run_average(common.averages, params, *common.average_weight, common.found_inf, check_only);
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
