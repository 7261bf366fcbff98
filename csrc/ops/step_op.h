// An op that steps. Its schema, its C++ signature, how it is registered and, for rules that are applied element by
// element, its body are made from the table of its rule (rules/table.h): such an op is one line in <name>_op.cpp.
#pragma once

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <utility>

#include "../rules/table.h"
#include "drivers.h"
#include "ops.h"
#include "step_ops.h"

namespace optim_ext::ops {

// A name as a template argument.
template <size_t kLength>
struct OpName {
  char text[kLength];
  constexpr OpName(const char (&name)[kLength]) { std::copy_n(name, kLength, text); }
};

template <HyperKind kKind>
struct HyperArgument;
template <>
struct HyperArgument<HyperKind::number> {
  using type = double;
};
template <>
struct HyperArgument<HyperKind::tensor> {
  using type = const Tensor&;
};
template <>
struct HyperArgument<HyperKind::flag> {
  using type = bool;
};
template <>
struct HyperArgument<HyperKind::whole> {
  using type = int64_t;
};

template <class Options>
constexpr HyperKind kind_of(size_t field) {
  return static_cast<HyperKind>(Options::kFields[field].kind);
}

// The arguments of one call. Options: the rule, or the struct that has the table where an op applies several rules.
template <class Options>
struct StepArguments {
  static constexpr size_t kLists = std::size(Options::kLists), kFields = std::size(Options::kFields);

  const char* op;
  const StepControls& controls;
  std::array<TensorList, kLists> lists;
  Options options{};                             // what the host is given as a number
  std::array<const Tensor*, kFields> tensors{};  // the others

  // The list in a role, by its place there; nothing where there is none.
  static constexpr int list_of(rules::List::Role role, int place) {
    for (size_t i = 0; i < kLists; ++i) {
      if (Options::kLists[i].role == role && Options::kLists[i].place == place) return static_cast<int>(i);
    }
    return -1;
  }
  List operand(int place) const { return list(rules::List::Role::operand, place); }
  List scalar(int place) const { return list(rules::List::Role::scalar, place); }
  std::optional<TensorList> steps() const {
    constexpr int kSteps = list_of(rules::List::Role::steps, 0);
    if constexpr (kSteps < 0) {
      return std::nullopt;
    } else {
      return lists[kSteps];
    }
  }

  void set(size_t field, double value) { options.*Options::kFields[field].number = value; }
  void set(size_t field, bool value) { options.*Options::kFields[field].flag = value; }
  void set(size_t field, int64_t value) { options.*Options::kFields[field].whole = value; }
  void set(size_t field, const Tensor& value) { tensors[field] = &value; }

  // Gives a rule with the same table what the host knows, and a call the rest to look at.
  template <class Rule>
  void fill(Call& call, Rule& rule, const void* whole, size_t bytes) const {
    for (size_t i = 0; i < kFields; ++i) {
      const auto& to = Rule::kFields[i];
      const auto& from = Options::kFields[i];
      if (to.flag) rule.*to.flag = options.*from.flag;
      if (to.whole) rule.*to.whole = options.*from.whole;
      if (!to.number) continue;
      if (tensors[i]) {
        call.set({{to.key, to.index, rule.*to.number, *tensors[i], to.in_scalars}}, whole, bytes);
      } else {
        call.set({{to.key, to.index, rule.*to.number, options.*from.number}}, whole, bytes);
      }
    }
  }
  template <class Rule>
  void fill(Call& call, Rule& rule) const {
    fill(call, rule, &rule, sizeof rule);
  }

 private:
  List list(rules::List::Role role, int place) const {
    const int i = list_of(role, place);
    return {Options::kLists[i].name, lists[i]};
  }
};

// Refuses a step for which at_step has no number, wherever the host knows what it depends on: `whole` is the rule that
// the call's hyper-parameters on the device belong to. Counts on the device are not known: there torch computes on,
// too.
template <class Rule>
void check_derived(const Call& call, const Rule& given, const void* whole) {
  if constexpr (requires { Rule::kDerived; }) {
    constexpr double kHarmless = 0.5;  // in place of what is on the device
    Rule rule = given;
    for (const DeviceHyper& hyper : call.device_hypers) {
      const auto offset = static_cast<const char*>(whole) + hyper.offset - reinterpret_cast<const char*>(&given);
      *reinterpret_cast<double*>(reinterpret_cast<char*>(&rule) + offset) = kHarmless;
    }
    const Bundle* last = nullptr;
    for (const Bundle& bundle : call.bundles) {
      if (last && call.at_one_point) break;
      if (bundle.device_step) continue;
      if (last && same_point(rules::kScalarsOf<Rule>, *last, bundle)) continue;
      last = &bundle;
      rules::Scalar scalars[kMaxScalars] = {};
      const Rule ready = ready_for(rule, bundle, scalars);
      for (const auto& derived : Rule::kDerived) {
        const double value = derived.value ? ready.*derived.value : scalars[derived.scalar].value;
        if (std::isfinite(value) || (derived.may_be_infinite && !std::isnan(value))) continue;
        DerivedProblem problem{call.op(), derived.name, value, bundle.step, derived.is_strict};
        for (const auto from : derived.from) {
          if (!from) break;
          for (const auto& field : Rule::kFields) {
            if (field.number == from) problem.add(field.key, field.index, rule.*from);
          }
        }
        problem.refuse();
      }
    }
  }
}

// Applies one rule element by element.
template <class Driver, class Rule, class Options>
void run_rule(Rule rule, const StepArguments<Options>& given) {
  const auto steps = given.steps();
  if constexpr (requires { Rule::kCountsInDouble; }) {
    rule.*Rule::kCountsInDouble = steps && !steps->empty() && (*steps)[0].scalar_type() == at::kDouble;
  }
  [&]<size_t... K, size_t... S>(std::index_sequence<K...>, std::index_sequence<S...>) {
    const CallSpec spec{.op = given.op,
                        .controls = given.controls,
                        .operands = {given.operand(K)...},
                        .state_steps = steps,
                        .scalars = {given.scalar(S)...},
                        .takes_sparse = true,
                        .any_order = true,
                        .takes_companions = true};
    Call call(spec, Rule::kOperands, Rule::kUsed, Rule::kUpdates, Handover::current());
    given.fill(call, rule);
    check_derived(call, rule, &rule);
    if (call.empty() || call.skip || call.leave(program_of<Rule>(), &rule) || CheckOnly::active()) return;
    call.commit(program_of<Rule>(), &rule);
    Driver::run(rule, call);
  }(std::make_index_sequence<Rule::kOperands>{}, std::make_index_sequence<rules::kScalarsOf<Rule>>{});
}

// What an op is made from. An op whose rule has variants, or that does more than apply a rule, says so in a row of
// its own that is derived from this one.
template <class Rule>
struct StepRow {
  using Options = Rule;
  // Calls use(rule) with the variant that these options ask for.
  template <class Use>
  static void choose(const Options&, const Use& use) {
    use(Rule{});
  }
};

template <class Driver, class Row, class Options>
void run_step(const StepArguments<Options>& given) {
  if constexpr (requires { Row::template run<Driver>(given); }) {
    Row::template run<Driver>(given);
  } else {
    Row::choose(given.options, [&](auto rule) { run_rule<Driver>(rule, given); });
  }
}

// Whether an op does more than apply one rule.
template <class Row>
constexpr bool runs_itself =
    requires(const StepArguments<typename Row::Options>& given) { Row::template run<CpuDriver>(given); };

// Whether parameters and state of an op may be kept in other ways than its rule sees them.
template <class Row>
constexpr bool has_companions = [] {
  if constexpr (requires { Row::kTakesCompanions; }) {
    return Row::kTakesCompanions;
  } else {
    return !runs_itself<Row>;
  }
}();

// The functions of an op, with the arguments its table says.
template <class Row, OpName kName, class Lists, class Fields>
struct StepFunctions;
template <class Row, OpName kName, size_t... L, size_t... F>
struct StepFunctions<Row, kName, std::index_sequence<L...>, std::index_sequence<F...>> {
  using Options = typename Row::Options;
  template <size_t>
  using ListArgument = TensorList;
  template <size_t I>
  using FieldArgument = typename HyperArgument<kind_of<Options>(I)>::type;
  using Signature = void(ListArgument<L>..., FieldArgument<F>..., const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, TensorList, const OptionalTensor&, TensorList);

  // What the dispatcher calls.
  template <class Driver>
  static void call(ListArgument<L>... lists, FieldArgument<F>... fields, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf, const OptionalTensor& grad_factor, TensorList averages,
                   const OptionalTensor& average_weight, TensorList companions) {
    const StepControls controls{grad_scale, found_inf, grad_factor, averages, average_weight, companions};
    in_turns(kName.text, controls, std::array{lists...}[0], [&](const StepControls& here, const Members& of) {
      const StepControls of_members =
          here.with_companions(of.of_each_kind(here.companions, std::array{lists...}[0].size()));
      StepArguments<Options> given{kName.text, of_members, {of(lists)...}};
      (given.set(F, fields), ...);
      run_step<Driver, Row>(given);
    });
  }

  // Calls a function, or the dispatcher, with arguments of any kind.
  template <class Function>
  static void apply(const Function& function, const std::vector<TensorList>& lists, const HyperValue* hypers,
                    const StepControls& controls) {
    function(lists[L]..., hypers[F].template as<FieldArgument<F>>()..., controls.grad_scale, controls.found_inf,
             controls.grad_factor, controls.averages, controls.average_weight, controls.companions);
  }
};

template <OpName kName, class Row>
class RegisteredStepOp final : public StepOp {
  using Options = typename Row::Options;
  using Functions = StepFunctions<Row, kName, std::make_index_sequence<std::size(Options::kLists)>,
                                  std::make_index_sequence<std::size(Options::kFields)>>;

 public:
  RegisteredStepOp() : StepOp(kName.text, lists_of_table(), hypers_of_table(), !runs_itself<Row>, has_companions<Row>) {
    library(torch::Library::FRAGMENT, std::nullopt).def(schema());
    implement<CpuDriver>(c10::DispatchKey::CPU, c10::DispatchKey::SparseCPU);
#if defined(OPTIM_EXT_WITH_CUDA)
    implement<CudaDriver>(c10::DispatchKey::CUDA, c10::DispatchKey::SparseCUDA);
#endif
    handle_ = c10::Dispatcher::singleton()
                  .findSchemaOrThrow((std::string("optim_ext::") + kName.text).c_str(), "")
                  .template typed<typename Functions::Signature>();
  }

  void run(const std::vector<TensorList>& lists, const HyperValue* hypers, const StepControls& controls,
           bool check_only) const override {
    if (!check_only) return Functions::apply([&](auto&&... args) { handle_->call(args...); }, lists, hypers, controls);
    const CheckOnly guard;
#if defined(OPTIM_EXT_WITH_CUDA)
    if (lists[0][0].is_cuda()) return Functions::apply(&Functions::template call<CudaDriver>, lists, hypers, controls);
#endif
    Functions::apply(&Functions::template call<CpuDriver>, lists, hypers, controls);
  }

 private:
  static std::vector<rules::List> lists_of_table() { return {std::begin(Options::kLists), std::end(Options::kLists)}; }
  static std::vector<HyperInfo> hypers_of_table() {
    std::vector<HyperInfo> hypers;
    for (const auto& field : Options::kFields)
      hypers.push_back({field.name, static_cast<HyperKind>(field.kind), field.key, field.index});
    return hypers;
  }

  torch::Library& library(torch::Library::Kind kind, std::optional<c10::DispatchKey> key) {
    return libraries_.emplace_back(kind, "optim_ext", key, __FILE__, __LINE__);
  }
  template <class Driver>
  void implement(c10::DispatchKey dense, c10::DispatchKey sparse) {
    library(torch::Library::IMPL, dense).impl(kName.text, &Functions::template call<Driver>);
    if (!runs_itself<Row>) library(torch::Library::IMPL, sparse).impl(kName.text, &Functions::template call<Driver>);
  }

  std::deque<torch::Library> libraries_;
  std::optional<c10::TypedOperatorHandle<typename Functions::Signature>> handle_;
};

}  // namespace optim_ext::ops
