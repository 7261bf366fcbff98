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
#include "whole_norms.h"

namespace optim_ext::ops {

namespace {

OpenParts sealed(OpenParts parts) {
  parts.rule.code.seal();
  if (parts.for_norms) parts.for_norms->code.seal();
  return parts;
}

bool fits(const OpenCode& from) {
  return from.values.size() == from.code.fields.size() + from.code.scalar_results.size();
}

}  // namespace

OpenVariant::OpenVariant(std::string name, OpenParts given)
    : name(std::move(name)),
      parts(sealed(std::move(given))),
      code(parts.rule.code),
      lists(parts.lists),
      hypers(parts.hypers),
      counts(code.counts),
      interpreted_programs_{interpreted(code), parts.for_norms ? interpreted(parts.for_norms->code) : RuleProgram{}},
      interpreted_{&interpreted_programs_[0], parts.for_norms ? &interpreted_programs_[1] : nullptr},
      programs_(&interpreted_) {}

std::string OpenParts::problem() const {
  const RuleCode& code = rule.code;
  if (const std::string found = code.problem(); !found.empty()) return found;
  if (static_cast<int>(lists.size()) != code.operands - 2 + code.scalars ||
      static_cast<int>(hypers.size()) != code.hypers || static_cast<int>(norms.size()) != code.norms || !fits(rule))
    return "what is said of it";
  unsigned made = 0;
  if (for_norms) {
    const RuleCode& first = for_norms->code;
    if (const std::string found = first.problem(); !found.empty()) return "for its norms, " + found;
    made = first.updates;
    const unsigned own = (1u << code.operands) - 1u;
    if (first.operands <= code.operands || (made & own) != 0 || (first.used & own & ~code.used) != 0 ||
        first.hypers != code.hypers || first.scalars != code.scalars || first.norms != 0 || !fits(*for_norms))
      return "code for its norms";
  }
  unsigned measured = 0;
  for (const OpenNorm& norm : norms) {
    if (norm.operand < 0 || norm.operand >= kMaxOperands) return "norms";
    measured |= 1u << norm.operand;
  }
  return (measured & ~(code.used | made)) == 0 && (made & ~measured) == 0 ? "" : "norms";
}

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

int64_t OpenVariants::define(std::string name, OpenParts parts) {
  const std::string problem = parts.problem();
  TORCH_CHECK_VALUE(problem.empty(), "optim_ext: the code of rule ", name, " is not sound: ", problem);
  const std::lock_guard lock(mutex);
  const auto [found, is_new] = numbers().emplace(name, static_cast<int64_t>(variants().size()));
  if (is_new) variants().emplace_back(std::move(name), std::move(parts));
  return found->second;
}

int64_t OpenVariants::define_compiled(std::string name, int64_t of, const std::string& path) {
  const OpenVariant& from = numbered(of);
  const RulePrograms* const programs = load_compiled_rule(path, from.parts);
  const int64_t number = define(std::move(name), from.parts);
  numbered(number).use(programs);
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

namespace {

bool fits(const RuleProgram* program, const RuleCode& code) {
  if (program == nullptr) return false;
  const auto* const sweeps = program->sweep[static_cast<int>(current_isa())];
  return program->bytes == code.bytes() && program->operands == code.operands && program->used == code.used &&
         program->updates == code.updates && program->scalars == code.numbers() && sweeps[0] != nullptr &&
         sweeps[1] != nullptr;
}

}  // namespace

const RulePrograms* load_compiled_rule(const std::string& path, const OpenParts& parts) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "optim_ext: a compiled rule cannot be loaded: ", dlerror());
  const auto get = reinterpret_cast<CompiledRule::Get>(dlsym(library, "optim_ext_rule"));
  const CompiledRule* const rule = get == nullptr ? nullptr : get(&cpu::tile_moves_for(current_isa()));
  const auto is_this_rule = [&] {
    if (rule == nullptr || rule->abi != CompiledRule::kAbi || rule->bundle_bytes != int32_t{sizeof(Bundle)} ||
        rule->pass_bytes != int32_t{sizeof(Pass)} || rule->layout_bytes != int32_t{sizeof(Layout)} ||
        rule->program_bytes != int32_t{sizeof(RuleProgram)})
      return false;
    const auto& [program, for_norms] = rule->programs;
    return fits(program, parts.rule.code) &&
           (parts.for_norms ? fits(for_norms, parts.for_norms->code) : for_norms == nullptr);
  };
  if (is_this_rule()) return &rule->programs;
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

// Refuses states in 8 bits of which a norm is to be taken: reductions read none.
void check_measured(const Call& call, const OpenVariant& variant) {
  for (const OpenNorm& norm : variant.parts.norms) {
    const auto place = static_cast<size_t>(norm.operand) - 2;
    if (norm.operand < 2 || norm.operand >= variant.code.operands) continue;
    for (size_t i = 0; i < call.bundles.size(); ++i) {
      if (call.bundles[i].storage[norm.operand] == Storage::q8)
        throw BadInput(kOp, variant.lists[place], static_cast<int64_t>(i), "is in 8 bits, and the rule takes its norm");
    }
  }
}

// Refuses a step for which one of its codes has no number.
void check_faults(const OpenVariant& variant, const OpenCode& from, const OpenRule& rule, double step,
                  const rules::Scalar* scalars) {
  OpenRule here = rule;
  here.code = &from.code;
  const std::vector<Fault> faults = faults_of(here, step, scalars);
  for (size_t k = 0; k < faults.size(); ++k) {
    if (faults[k] == Fault::none) continue;
    const auto& [text, line] = from.values[k];
    const bool divides = faults[k] == Fault::divides_by_zero;
    std::ostringstream out;
    out << "optim_ext::rule_: " << (variant.counts ? optim_ext::ops::text("at step ", step, " ") : "")
        << (divides ? "a division by zero" : "a root or logarithm of a number that has none") << " in `" << text
        << "` (line " << line << "), with ";
    for (size_t h = 1; h < variant.hypers.size(); ++h)
      out << (h == 1 ? "" : ", ") << hyper_name(variant.hypers[h].key.c_str(), variant.hypers[h].index) << " = "
          << rule.numbers[h];
    throw BadHyper(out.str(), divides);
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
    if (variant.parts.for_norms) check_faults(variant, *variant.parts.for_norms, rule, bundle.step, scalars);
    check_faults(variant, variant.parts.rule, rule, bundle.step, scalars);
  }
}

// The first sweep of a rule with norms.
void measure(const OpenVariant& variant, const RuleProgram* program, const OpenRule& rule, Call& call,
             const Tensor& results) {
  OpenRule first = rule;
  if (program) first.code = &variant.parts.for_norms->code;
  const bool has_parts = WholeNorms::current() != nullptr;
  std::vector<CpuDriver::Norm> norms;
  for (const auto& [operand, is_mean] : variant.parts.norms)
    norms.push_back(
        {operand, is_mean && !has_parts, results[static_cast<int64_t>(norms.size())].mutable_data_ptr<double>()});
  CpuDriver::run_for_norms(program, &first, call, norms);
  for (const CpuDriver::Norm& norm : norms) {
    double* const of = norm.results;
    // Of the gradients as the rule will see them.
    if (norm.operand == kGradOperand)
      std::transform(of, of + call.bundles.size(), of, [&](double value) {
        return (call.pass.unscale ? value / call.pass.grad_scale : value) * call.pass.grad_factor;
      });
  }
  if (program) call.begin_second_rule();
}

// Gives each parameter the norms that the rule's second sweep takes.
void use_norms(const OpenVariant& variant, TensorList params, const Tensor& norms, Call& call) {
  const WholeNorms* const wholes = WholeNorms::current();
  for (size_t k = 0; k < variant.parts.norms.size(); ++k) {
    double* const of = norms[static_cast<int64_t>(k)].mutable_data_ptr<double>();
    for (size_t i = 0; wholes && variant.parts.norms[k].is_mean && i < params.size(); ++i)
      of[i] /= std::sqrt(wholes->numel_of(params[i], static_cast<double>(call.bundles[i].numel)));
    call.use_scalars(variant.code.scalars + static_cast<int>(k), of);
  }
}

// On a GPU. Rules that take norms have no kernels there.
void run_on_gpu([[maybe_unused]] const OpenVariant& variant, [[maybe_unused]] Call& call,
                [[maybe_unused]] const OpenRule& rule) {
#if defined(OPTIM_EXT_WITH_CUDA)
  TORCH_CHECK_VALUE(variant.parts.norms.empty(), "optim_ext::rule_: rules that take norms run on the CPU only, found ",
                    call.device);
  const OpenKernels* const kernels = variant.kernels_on(call.device.index());
  check_kernels(kernels, variant, call);
  if (call.empty() || call.skip || CheckOnly::active()) return;
  call.commit(*variant.programs().rule, &rule);
  run_kernels(*kernels, rule, call);
#endif
}

void run_variant(const OpenVariant& variant, const StepControls& controls, const OpenLists& lists, TensorList hypers) {
  const auto name_of = [&](int place) {
    const auto& names = variant.lists;
    return place < static_cast<int>(names.size()) ? names[static_cast<size_t>(place)].c_str() : "state";
  };
  const auto state = [&](int k) { return List{name_of(k), lists[static_cast<size_t>(2 + k)]}; };
  const auto scalar = [&](int k) {
    return List{name_of(variant.code.operands - 2 + k), lists[kFirstScalar + static_cast<size_t>(k)]};
  };
  const bool has_norms = !variant.parts.norms.empty();
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
                        .takes_sparse = !has_norms,
                        .any_order = !has_norms,
                        .takes_companions = true,
                        .companions_on_gpu = !has_norms};
    Call call(spec, variant.code.operands, variant.code.used, variant.code.updates,
              has_norms ? nullptr : Handover::current());
    OpenRule rule{&variant.code, {}};
    fill(call, variant, hypers, rule);
    check_faults(call, variant, rule);
    check_measured(call, variant);
    if (!call.device.is_cpu()) return run_on_gpu(variant, call, rule);
    const RulePrograms& programs = variant.programs();
    if (call.empty() || call.skip) return;
    if (has_norms) {
      const auto norms = norms_for_step(call, lists[0], controls, [&](const Tensor& taken) {
        measure(variant, programs.for_norms, rule, call, taken);
      });
      if (!norms) return;
      use_norms(variant, lists[0], *norms, call);
      call.store_scalars(*programs.rule, &rule);
    } else {
      if (call.leave(*programs.rule, &rule) || CheckOnly::active()) return;
      call.commit(*programs.rule, &rule);
    }
    CpuDriver::run({Sweep(*programs.rule, &rule, call.bundles, call.pass)});
  };
  static_assert(kOpenStates == 8 && kMaxScalars == 2);
  switch (variant.code.scalars) {
    case 0: return run({});
    case 1: return run({scalar(0)});
    default: return run({scalar(0), scalar(1)});
  }
}

void rule_(TensorList params, TensorList grads, TensorList state0, TensorList state1, TensorList state2,
           TensorList state3, TensorList state4, TensorList state5, TensorList state6, TensorList state7,
           TensorList scalar0, TensorList scalar1, TensorList state_steps, c10::string_view rule, TensorList hypers,
           const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& grad_factor,
           TensorList averages, const OptionalTensor& average_weight, TensorList companions) {
  const OpenVariant& variant = OpenVariants::named({rule.data(), rule.size()});
  const StepControls controls{grad_scale, found_inf, grad_factor, averages, average_weight, companions};
  in_turns(kOp, controls, params, [&](const StepControls& all, const Members& of) {
    const StepControls here = all.with_companions(of.of_each_kind(all.companions, params.size()));
    const OpenLists lists{of(params), of(grads),  of(state0), of(state1),  of(state2),  of(state3),     of(state4),
                          of(state5), of(state6), of(state7), of(scalar0), of(scalar1), of(state_steps)};
    run_variant(variant, here, lists, hypers);
  });
}

using Signature = decltype(rule_);

constexpr const char* kSchema =
    "rule_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] state0, Tensor(d!)[] state1, Tensor(e!)[] state2, "
    "Tensor(f!)[] state3, Tensor(g!)[] state4, Tensor(h!)[] state5, Tensor(i!)[] state6, Tensor(j!)[] state7, "
    "Tensor(k!)[] scalar0, Tensor(l!)[] scalar1, Tensor(m!)[] state_steps, *, str rule, Tensor[] hypers";

const c10::TypedOperatorHandle<Signature>& handle() {
  static const auto found = c10::Dispatcher::singleton().findSchemaOrThrow("optim_ext::rule_", "").typed<Signature>();
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(optim_ext, m) { m.def(step_schema(kSchema)); }
TORCH_LIBRARY_IMPL(optim_ext, CPU, m) { m.impl("rule_", &rule_); }
TORCH_LIBRARY_IMPL(optim_ext, SparseCPU, m) { m.impl("rule_", &rule_); }
#if defined(OPTIM_EXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(optim_ext, CUDA, m) { m.impl("rule_", &rule_); }
TORCH_LIBRARY_IMPL(optim_ext, SparseCUDA, m) { m.impl("rule_", &rule_); }
#endif

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
             controls.averages, controls.average_weight, controls.companions);
  };
  if (check_only) {
    const CheckOnly guard;
    call(rule_);
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
