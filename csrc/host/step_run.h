// One step on its way through the ops: calls with what is asked of them, on their device, and with names for what they
// refuse.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../call/controls.h"
#include "../ops/step_ops.h"
#include "gradients.h"
#include "planned_call.h"

namespace optim_ext::ops {

namespace py = pybind11;

class StepRun {
 public:
  // All of them must outlive the step.
  StepRun(const StepOp& op, const StepControls& controls, const py::object& param_groups)
      : op_(op), controls_(controls), param_groups_(param_groups) {}

  bool averages(const PlannedCall& call) const { return controls_.average_weight && call.is_averaged(); }

  // Steps the members that have a gradient and averages the others.
  void run(const PlannedCall& call, const Gathered& gathered, const std::vector<HyperValue>& hypers,
           bool check_only) const;

  // Runs the body; what it refuses by index is told with the parameter's name, and a bad hyper-parameter with its
  // group. members: into the call's lists, all of them if empty.
  template <class Body>
  void naming(const PlannedCall& call, const std::vector<int64_t>& members, const Body& body) const {
    const RemembersCalls remembers(*call.known);
    try {
      body();
    } catch (const BadHyper& bad) {
      throw BadHyper("group " + std::to_string(call.group) + ": " + bad.what_without_backtrace(), bad.divides);
    } catch (const BadInput& bad) {
      if (bad.index < 0) throw;
      const int64_t index = call.indices[members.empty() ? bad.index : members[bad.index]];
      throw std::runtime_error(describe(call.group, index, param_groups_) + ": " + name_of(call, bad.list) + " " +
                               bad.problem);
    } catch (const c10::ValueError& bad) {
      TORCH_CHECK_VALUE(false, "group ", call.group, ": ", bad.what_without_backtrace());
    }
  }

 private:
  void step_members(const PlannedCall& call, const Gathered& gathered, const std::vector<HyperValue>& hypers,
                    bool check_only) const;
  void average_idle(const PlannedCall& call, const Gathered& gathered, bool check_only) const;
  std::string name_of(const PlannedCall& call, const std::string& list) const;

  const StepOp& op_;
  const StepControls& controls_;
  const py::object& param_groups_;
};

}  // namespace optim_ext::ops
