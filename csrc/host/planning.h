// How a plan is made: the calls that a step of an optimizer consists of.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <unordered_set>
#include <vector>

#include "../ops/step_ops.h"
#include "gradients.h"
#include "planned_call.h"
#include "state_numbers.h"

namespace optim_ext::ops {

namespace py = pybind11;

class Planning {
 public:
  // averages: running averages by parameter, to be brought up to date with it. partial: keys of state that only some
  // parameters have; the op is given a list of these. numbers: keys of state that are Python numbers; the op is given
  // tensors that hold these during the step.
  Planning(const StepOp& op, const py::list& param_groups, const py::dict& state, const py::dict& averages,
           const py::set& partial, const py::set& numbers)
      : op_(op),
        param_groups_(param_groups),
        state_(state),
        averages_(averages),
        partial_(partial),
        number_keys_(numbers) {}

  // Adds the calls for some parameters of a group. spec: (group index, indices into group["params"], state keys,
  // whether gradients may be sparse, whether they may be dense, ways); a key of None leaves that list empty. ways: for
  // each parameter None, or (state keys of its own, keys of its companions); or nothing.
  void add(const py::tuple& spec);

  std::vector<PlannedCall> calls;
  StateNumbers numbers;
  std::unordered_set<PyObject*> state_tensors;
  size_t specs = 0;

 private:
  PlannedCall empty_call(const py::tuple& spec, const py::tuple& keys, const py::object& way, at::Device device) const;
  // A parameter on its way into the plan.
  struct Member {
    size_t group;
    int64_t index;
    const Tensor& tensor;
  };
  std::string name_of(const Member& member) const { return describe(member.group, member.index, param_groups_); }
  bool add_companion(PlannedCall& call, const Member& member, const py::object& entry, size_t kind);
  bool add_state(PlannedCall& call, const Member& member, const py::object& entry, size_t k, const py::object& key);

  const StepOp& op_;
  const py::list& param_groups_;
  const py::dict& state_;
  const py::dict& averages_;
  const py::set& partial_;
  const py::set& number_keys_;
};

}  // namespace optim_ext::ops
