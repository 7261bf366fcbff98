#include "open_rules.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "../ops/rule_op.h"
#include "op_tables.h"
#include "plan.h"

namespace optim_ext::ops {

namespace py = pybind11;

namespace {

#define OPTIM_EXT_TEXT(op) #op,
const std::vector<std::string> kTileOps{OPTIM_EXT_FOR_EACH_TILE_OP(OPTIM_EXT_TEXT)};
const std::vector<std::string> kUniformOps{OPTIM_EXT_FOR_EACH_UNIFORM_OP(OPTIM_EXT_TEXT)};
#undef OPTIM_EXT_TEXT

template <class Op>
Op op_named(const std::vector<std::string>& names, const py::handle& name) {
  const auto found = std::find(names.begin(), names.end(), py::cast<std::string>(name));
  TORCH_CHECK_VALUE(found != names.end(), "optim_ext: rules have no operation ", py::cast<std::string>(name));
  return static_cast<Op>(found - names.begin());
}

template <class Instruction, class Op>
Instruction instruction(const std::vector<std::string>& names, const py::handle& item) {
  using Register = decltype(Instruction::to);
  const auto parts = py::cast<py::tuple>(item);
  return {op_named<Op>(names, parts[0]), py::cast<Register>(parts[1]), py::cast<Register>(parts[2]),
          py::cast<Register>(parts[3]), py::cast<Register>(parts[4])};
}

std::vector<OpenHyper> hypers_in(const py::list& given) {
  std::vector<OpenHyper> hypers;
  for (const auto& item : given) {
    const auto pair = py::cast<py::tuple>(item);
    hypers.push_back({py::cast<std::string>(pair[0]), pair[1].is_none() ? -1 : py::cast<int>(pair[1])});
  }
  return hypers;
}

RuleCode code_in(const py::dict& given) {
  RuleCode code{};
  code.operands = py::cast<int>(given["operands"]);
  code.scalars = py::cast<int>(given["scalars"]);
  code.norms = static_cast<int>(py::len(given["norms"]));
  code.hypers = static_cast<int>(py::len(given["hypers"]));
  code.counts = py::cast<bool>(given["counts"]);
  code.used = py::cast<unsigned>(given["used"]);
  code.updates = py::cast<unsigned>(given["updates"]);
  code.constants = py::cast<std::vector<double>>(given["constants"]);
  for (const auto& item : given["uniform"])
    code.uniform.push_back(instruction<UniformInstruction, UniformOp>(kUniformOps, item));
  code.fields = py::cast<std::vector<uint16_t>>(given["fields"]);
  code.scalar_results = py::cast<std::vector<uint16_t>>(given["scalar_results"]);
  code.uniform_registers = py::cast<int>(given["uniform_registers"]);
  for (const auto& item : given["tile"]) code.tile.push_back(instruction<TileInstruction, TileOp>(kTileOps, item));
  code.temporaries = py::cast<int>(given["temporaries"]);
  for (const auto& item : given["shared"]) {
    const auto pair = py::cast<py::tuple>(item);
    code.shared.push_back({py::cast<int32_t>(pair[0]), py::cast<double>(pair[1])});
  }
  return code;
}

OpenCode open_code_in(const py::dict& given) {
  OpenCode found{code_in(given), {}};
  for (const auto& item : given["values"]) {
    const auto pair = py::cast<py::tuple>(item);
    found.values.push_back({py::cast<std::string>(pair[0]), py::cast<int>(pair[1])});
  }
  return found;
}

OpenParts parts_in(const py::dict& given) {
  OpenParts parts{open_code_in(given),
                  {},
                  std::nullopt,
                  py::cast<std::vector<std::string>>(given["lists"]),
                  hypers_in(given["hypers"])};
  for (const auto& item : given["norms"]) {
    const auto [kind, operand] = py::cast<std::pair<std::string, int>>(item);
    parts.norms.push_back({operand, kind == "rms"});
  }
  if (!given["for_norms"].is_none()) parts.for_norms = open_code_in(given["for_norms"]);
  return parts;
}

// The same variant under another name, run on one GPU by what was compiled for it.
int64_t define_on_gpu([[maybe_unused]] const std::string& name, [[maybe_unused]] int64_t of, [[maybe_unused]] int gpu,
                      [[maybe_unused]] const std::vector<std::string>& images) {
#if defined(OPTIM_EXT_WITH_CUDA)
  const OpenVariant& from = OpenVariants::numbered(of);
  const OpenKernels* const kernels = load_kernels(from, gpu, images);
  const int64_t number = OpenVariants::define(name, from.parts);
  OpenVariants::numbered(number).use(gpu, kernels);
  return number;
#else
  TORCH_CHECK(false, "this build of optim_ext has no CUDA kernels (see python -m optim_ext)");
#endif
}

}  // namespace

void bind_open_rules(py::module_& m) {
  m.def(
      "define_rule_op",
      [](const std::string& class_name, const py::list& state, const py::list& hypers) {
        return as_torch_raises([&] {
          std::vector<std::pair<std::string, rules::List::Role>> lists;
          for (const auto& item : state) {
            const auto [key, role] = py::cast<std::pair<std::string, std::string>>(item);
            lists.emplace_back(key, role == "steps"    ? rules::List::Role::steps
                                    : role == "scalar" ? rules::List::Role::scalar
                                                       : rules::List::Role::operand);
          }
          const OpenRuleOp& op = OpenRuleOp::define(class_name, lists, hypers_in(hypers));
          return py::make_tuple(op.name, table_of(op));
        });
      },
      py::arg("class_name"), py::arg("state"), py::arg("hypers"));
  m.def(
      "define_rule",
      [](const std::string& name, const py::dict& given) {
        return as_torch_raises([&] { return OpenVariants::define(name, parts_in(given)); });
      },
      py::arg("name"), py::arg("code"));
  m.def(
      "define_compiled_rule",
      [](const std::string& name, int64_t of, const std::string& path) {
        return as_torch_raises([&] { return OpenVariants::define_compiled(name, of, path); });
      },
      py::arg("name"), py::arg("of"), py::arg("path"));
  m.def(
      "run_rule_by",
      [](int64_t number, const std::optional<int64_t>& other) {
        as_torch_raises([&] {
          OpenVariant& variant = OpenVariants::numbered(number);
          other ? variant.use(&OpenVariants::numbered(*other).programs()) : variant.interpret();
        });
      },
      py::arg("number"), py::arg("other"));
  m.def(
      "define_rule_on_gpu",
      [](const std::string& name, int64_t of, int gpu, const std::vector<py::bytes>& images) {
        return as_torch_raises([&] { return define_on_gpu(name, of, gpu, {images.begin(), images.end()}); });
      },
      py::arg("name"), py::arg("of"), py::arg("gpu"), py::arg("images"));
  m.def(
      "run_rule_on_gpu_by",
      [](int64_t number, int64_t other, int gpu) {
        as_torch_raises(
            [&] { OpenVariants::numbered(number).use(gpu, OpenVariants::numbered(other).kernels_on(gpu)); });
      },
      py::arg("number"), py::arg("other"), py::arg("gpu"));
}

}  // namespace optim_ext::ops
