#include "rule_op.h"

#include <ATen/ops/scalar_tensor.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <map>
#include <mutex>

#include "../call/tensors.h"
#include "../kernels/compiled_rule.h"
#include "drivers.h"
#include "in_turns.h"

namespace optim_ext::ops {

OpenVariant::OpenVariant(std::string name, RuleCode given, std::vector<std::string> lists,
                         std::vector<OpenHyper> hypers, std::vector<OpenValue> values)
    : name(std::move(name)),
      code([&] {
        given.seal();
        return std::move(given);
      }()),
      lists(std::move(lists)),
      hypers(std::move(hypers)),
      values(std::move(values)),
      counts(code.counts),
      interpreted_(interpreted(code)),
      program_(&interpreted_) {}

namespace {

std::mutex mutex;  // of everything that is defined while others may step
std::deque<OpenVariant>& variants() {
  static std::deque<OpenVariant> all;
  return all;
}
std::map<std::string, int64_t, std::less<>>& numbers() {
  static std::map<std::string, int64_t, std::less<>> all;
  return all;
}

}  // namespace

int64_t OpenVariants::define(std::string name, RuleCode code, std::vector<std::string> lists,
                             std::vector<OpenHyper> hypers, std::vector<OpenValue> values) {
  const std::string problem = code.problem();
  TORCH_CHECK_VALUE(problem.empty(), "optim_ext: the code of rule ", name, " is not sound: ", problem);
  TORCH_CHECK_VALUE(static_cast<int>(lists.size()) == code.operands - 2 + code.scalars &&
                        static_cast<int>(hypers.size()) == code.hypers &&
                        values.size() == code.fields.size() + code.scalar_results.size(),
                    "optim_ext: the code of rule ", name, " does not fit what is said of it");
  const std::lock_guard lock(mutex);
  const auto [found, is_new] = numbers().emplace(name, static_cast<int64_t>(variants().size()));
  if (is_new) {
    variants().emplace_back(std::move(name), std::move(code), std::move(lists), std::move(hypers), std::move(values));
  }
  return found->second;
}

int64_t OpenVariants::define_compiled(std::string name, int64_t of, const std::string& path) {
  const OpenVariant& from = numbered(of);
  const RuleProgram* const program = load_compiled_rule(path, from.code);
  const int64_t number = define(std::move(name), from.code, from.lists, from.hypers, from.values);
  numbered(number).use(program);
  return number;
}

OpenVariant& OpenVariants::numbered(int64_t number) {
  const std::lock_guard lock(mutex);
  TORCH_CHECK_VALUE(number >= 0 && static_cast<size_t>(number) < variants().size(), "optim_ext: there is no rule ",
                    number);
  return variants()[static_cast<size_t>(number)];
}

const OpenVariant& OpenVariants::named(std::string_view name) {
  const std::lock_guard lock(mutex);
  const auto found = numbers().find(name);
  TORCH_CHECK_VALUE(found != numbers().end(), "optim_ext::rule_: this process knows no rule ", name,
                    "; make an optimizer of its class first");
  return variants()[static_cast<size_t>(found->second)];
}

const RuleProgram* load_compiled_rule(const std::string& path, const RuleCode& code) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "optim_ext: a compiled rule cannot be loaded: ", dlerror());
  const auto get = reinterpret_cast<const CompiledRule* (*)()>(dlsym(library, "optim_ext_rule"));
  const CompiledRule* const rule = get == nullptr ? nullptr : get();
  const auto fits = [&] {
    if (rule == nullptr || rule->abi != CompiledRule::kAbi || rule->bundle_bytes != int32_t{sizeof(Bundle)} ||
        rule->pass_bytes != int32_t{sizeof(Pass)} || rule->layout_bytes != int32_t{sizeof(Layout)} ||
        rule->program_bytes != int32_t{sizeof(RuleProgram)})
      return false;
    const RuleProgram& program = *rule->program;
    const auto* const sweeps = program.sweep[static_cast<int>(current_isa())];
    return program.bytes == code.bytes() && program.operands == code.operands && program.used == code.used &&
           program.updates == code.updates && program.scalars == code.scalars && sweeps[0] != nullptr &&
           sweeps[1] != nullptr;
  };
  if (fits()) return rule->program;
  dlclose(library);
  TORCH_CHECK(false, "optim_ext: ", path, " is not this rule compiled for this build and ", isa_name(current_isa()));
}

namespace {

using OpenLists = std::array<TensorList, kOpenLists>;  // params, grads, state0 to state7, scalar0, scalar1, state_steps
constexpr const char* kOp = "rule_";
constexpr size_t kFirstScalar = kMaxOperands, kSteps = kOpenLists - 1;

// A number on the host, read without asking the dispatcher.
std::optional<double> host_number(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_cpu() || tensor.numel() != 1 || tensor.layout() != at::kStrided ||
      tensor.scalar_type() != at::kDouble || tensor.is_neg() || !tensor.has_storage())
    return std::nullopt;
  return *tensor.const_data_ptr<double>();
}

void fill(Call& call, const OpenVariant& variant, TensorList hypers, OpenRule& rule) {
  TORCH_CHECK_VALUE(hypers.size() == variant.hypers.size(), "optim_ext::rule_: ", hypers.size(),
                    " hyper-parameters are given, the rule takes ", variant.hypers.size());
  for (size_t k = 0; k < hypers.size(); ++k) {
    const auto& [key, index] = variant.hypers[k];
    if (const auto number = host_number(hypers[k])) {
      Hyper hyper(key.c_str(), rule.numbers[k], *number);
      hyper.index = index;
      call.set({hyper}, &rule, sizeof rule);
    } else {
      call.set({{key.c_str(), index, rule.numbers[k], hypers[k], variant.code.scalars > 0}}, &rule, sizeof rule);
    }
  }
}

// Refuses a step for which the uniform code has no number, as Python would: wherever the host knows what it depends on.
void check_faults(const Call& call, const OpenVariant& variant, const OpenRule& rule) {
  if (!call.device_hypers.empty()) return;
  const Bundle* last = nullptr;
  for (const Bundle& bundle : call.bundles) {
    if (last && call.at_one_point) break;
    if (bundle.device_step || (last && same_point(variant.code.scalars, *last, bundle))) continue;
    last = &bundle;
    rules::Scalar scalars[kMaxScalars] = {};
    for (int k = 0; k < variant.code.scalars; ++k) {
      if (bundle.scalars[k].device) return;
      scalars[k] = {bundle.scalars[k].value, bundle.scalars[k].storage == Storage::f64};
    }
    const std::vector<Fault> faults = faults_of(rule, bundle.step, scalars);
    for (size_t k = 0; k < faults.size(); ++k) {
      if (faults[k] == Fault::none) continue;
      const auto& [text, line] = variant.values[k];
      const bool divides = faults[k] == Fault::divides_by_zero;
      std::ostringstream out;
      out << "optim_ext::rule_: " << (variant.counts ? optim_ext::ops::text("at step ", bundle.step, " ") : "")
          << (divides ? "a division by zero" : "a root or logarithm of a number that has none") << " in `" << text
          << "` (line " << line << "), with ";
      for (size_t h = 1; h < variant.hypers.size(); ++h)
        out << (h == 1 ? "" : ", ") << hyper_name(variant.hypers[h].key.c_str(), variant.hypers[h].index) << " = "
            << rule.numbers[h];
      throw BadHyper(out.str(), divides);
    }
  }
}

template <class Driver>
void run_variant(const OpenVariant& variant, const StepControls& controls, const OpenLists& lists, TensorList hypers) {
  const auto name_of = [&](int place) {
    const auto& names = variant.lists;
    return place < static_cast<int>(names.size()) ? names[static_cast<size_t>(place)].c_str() : "state";
  };
  const auto state = [&](int k) { return List{name_of(k), lists[static_cast<size_t>(2 + k)]}; };
  const auto scalar = [&](int k) {
    return List{name_of(variant.code.operands - 2 + k), lists[kFirstScalar + static_cast<size_t>(k)]};
  };
  const auto run = [&](std::initializer_list<List> scalars) {
    const CallSpec spec{.op = kOp,
                        .controls = controls,
                        .operands = {{"params", lists[0]},
                                     {"grads", lists[1]},
                                     state(0),
                                     state(1),
                                     state(2),
                                     state(3),
                                     state(4),
                                     state(5),
                                     state(6),
                                     state(7)},
                        .state_steps = variant.counts ? std::optional(lists[kSteps]) : std::nullopt,
                        .scalars = scalars,
                        .any_order = true};
    Call call(spec, variant.code.operands, variant.code.used, variant.code.updates, Handover::current());
    OpenRule rule{&variant.code, {}};
    fill(call, variant, hypers, rule);
    check_faults(call, variant, rule);
    const RuleProgram& program = variant.program();
    if (call.empty() || call.skip || call.leave(program, &rule) || CheckOnly::active()) return;
    call.commit(program, &rule);
    Driver::run({Sweep(program, &rule, call.bundles, call.pass)});
  };
  static_assert(kOpenStates == 8 && kMaxScalars == 2);
  switch (variant.code.scalars) {
    case 0: return run({});
    case 1: return run({scalar(0)});
    default: return run({scalar(0), scalar(1)});
  }
}

template <class Driver>
void rule_(TensorList params, TensorList grads, TensorList state0, TensorList state1, TensorList state2,
           TensorList state3, TensorList state4, TensorList state5, TensorList state6, TensorList state7,
           TensorList scalar0, TensorList scalar1, TensorList state_steps, c10::string_view rule, TensorList hypers,
           const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& grad_factor,
           TensorList averages, const OptionalTensor& average_weight) {
  const OpenVariant& variant = OpenVariants::named({rule.data(), rule.size()});
  const StepControls controls{grad_scale, found_inf, grad_factor, averages, average_weight};
  in_turns(kOp, controls, params, [&](const StepControls& here, const Members& of) {
    const OpenLists lists{of(params), of(grads),  of(state0), of(state1),  of(state2),  of(state3),     of(state4),
                          of(state5), of(state6), of(state7), of(scalar0), of(scalar1), of(state_steps)};
    run_variant<Driver>(variant, here, lists, hypers);
  });
}

using Signature = decltype(rule_<CpuDriver>);

constexpr const char* kSchema =
    "rule_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] state0, Tensor(d!)[] state1, Tensor(e!)[] state2, "
    "Tensor(f!)[] state3, Tensor(g!)[] state4, Tensor(h!)[] state5, Tensor(i!)[] state6, Tensor(j!)[] state7, "
    "Tensor(k!)[] scalar0, Tensor(l!)[] scalar1, Tensor(m!)[] state_steps, *, str rule, Tensor[] hypers";

const c10::TypedOperatorHandle<Signature>& handle() {
  static const auto found = c10::Dispatcher::singleton().findSchemaOrThrow("optim_ext::rule_", "").typed<Signature>();
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(optim_ext, m) { m.def(step_schema(kSchema, /*companions=*/false)); }
TORCH_LIBRARY_IMPL(optim_ext, CPU, m) { m.impl("rule_", &rule_<CpuDriver>); }

void OpenRuleOp::run(const std::vector<TensorList>& given, const HyperValue* values, const StepControls& controls,
                     bool check_only) const {
  const OpenVariant& variant = OpenVariants::numbered(values[0].whole);
  OpenLists in;
  for (size_t i = 0; i < lists.size(); ++i) {
    switch (lists[i].role) {
      case rules::List::Role::scalar: in[kFirstScalar + static_cast<size_t>(lists[i].place)] = given[i]; break;
      case rules::List::Role::steps: in[kSteps] = given[i]; break;
      default: in[static_cast<size_t>(lists[i].place)] = given[i];
    }
  }
  static const Tensor up = at::scalar_tensor(-1.0, at::kDouble), down = at::scalar_tensor(1.0, at::kDouble);
  std::vector<Tensor> numbers{values[1].flag ? up : down};
  for (size_t k = 2; k < hypers.size(); ++k) numbers.push_back(values[k].tensor);
  const auto call = [&](const auto& function) {
    function(in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8], in[9], in[10], in[11], in[12],
             c10::string_view(variant.name), numbers, controls.grad_scale, controls.found_inf, controls.grad_factor,
             controls.averages, controls.average_weight);
  };
  if (check_only) {
    const CheckOnly guard;
    call(rule_<CpuDriver>);
  } else {
    call([](auto&&... arguments) { handle().call(arguments...); });
  }
}

const OpenRuleOp& OpenRuleOp::define(const std::string& class_name,
                                     const std::vector<std::pair<std::string, rules::List::Role>>& state,
                                     const std::vector<OpenHyper>& options) {
  static std::deque<std::string> texts;  // names that tables point to
  static std::deque<OpenRuleOp> ops;
  const std::lock_guard lock(mutex);
  const auto kept = [](std::string text) { return texts.emplace_back(std::move(text)).c_str(); };
  std::vector<rules::List> lists{rules::params(), rules::grads()};
  int8_t operands = 2, scalars = 0;
  for (const auto& [key, role] : state) {
    if (role == rules::List::Role::steps) {
      lists.push_back(rules::steps());
    } else {
      const char* const name = kept(key);
      const bool is_scalar = role == rules::List::Role::scalar;
      TORCH_CHECK_VALUE(is_scalar ? scalars < kMaxScalars : operands < kMaxOperands, "optim_ext: ", class_name,
                        " has more state than kernels take");
      lists.push_back({name, name, role, is_scalar ? scalars++ : operands++});
    }
  }
  std::vector<HyperInfo> hypers{{"rule", HyperKind::whole, "rule", -1}, {"maximize", HyperKind::flag, "maximize", -1}};
  for (const auto& [key, index] : options) {
    const char* const name = kept(index < 0 ? key : text(key, index));
    hypers.push_back({name, HyperKind::tensor, kept(key), index});
  }
  return ops.emplace_back(kept(text("rule_ of ", class_name, " ", ops.size())), std::move(lists), std::move(hypers));
}

}  // namespace optim_ext::ops
