#include "op_tables.h"

#include "torch_internals.h"

namespace optim_ext::ops {

namespace py = pybind11;

py::dict table_of(const StepOp& op) {
  static constexpr const char* kKinds[] = {"number", "tensor", "flag", "whole"};
  static constexpr const char* kRoles[] = {"operand", "scalar", "partial", "steps"};
  py::list lists, hypers;
  py::dict places;
  for (const rules::List& list : op.lists) {
    lists.append(py::make_tuple(list.name, list.key, kRoles[static_cast<int>(list.role)]));
    if (list.role == rules::List::Role::operand && list.key != nullptr) places[list.key] = list.place;
  }
  for (const HyperInfo& hyper : op.hypers) {
    hypers.append(py::make_tuple(hyper.name, kKinds[static_cast<int>(hyper.kind)], hyper.key,
                                 hyper.index < 0 ? py::object(py::none()) : py::object(py::int_(hyper.index))));
  }
  py::dict table;
  table["lists"] = lists;
  table["places"] = places;
  table["hypers"] = hypers;
  table["is_element_wise"] = op.is_element_wise;
  table["takes_companions"] = op.takes_companions;
  return table;
}

void bind_op_tables(py::module_& m) {
  m.def(
      "step_ops",
      [] {
        py::dict tables;
        for (const StepOp* op : StepOp::all()) tables[op->name] = table_of(*op);
        return tables;
      },
      "The ops an optimizer steps with: their lists of tensors as (argument, key of state, role), and their "
      "hyper-parameters as "
      "(argument, kind, option, index in the tuple there or None).");
  m.def("is_observed", &at::hasCallbacks, "Whether a profiler, or another observer of ops, is at work.");
  m.def("counts_versions_directly", &internals::counts_versions_directly,
        "Whether torch keeps the versions of tensors where the host path knows them to be.");
  m.def("reads_dicts_directly", &internals::reads_dicts_directly,
        "Whether the interpreter's dicts are laid out as the host path knows them, so that it need not ask for each "
        "item.");
}

}  // namespace optim_ext::ops
