#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include "../rules/adafactor.h"
#include "step_op.h"

namespace optim_ext::ops {

namespace {

// Elements of row_vars and col_vars that are worked on at a time, so that the memory this needs besides stays small.
// Only tensors of many small matrices, as convolutions are, come near it.
constexpr int64_t kMostAverages = 1 << 20;

// Whether a parameter has row_var and col_var, or else a variance.
bool is_factored(const Tensor& param) { return param.dim() > 1; }

// State that only some parameters have comes as a list of these tensors, in the order of the parameters. This gives
// every parameter its own, or none.
std::vector<Tensor> spread(TensorList tensors, TensorList params, bool factored) {
  std::vector<Tensor> all;
  size_t taken = 0;
  for (const Tensor& param : params) {
    const bool has_one = param.defined() && is_factored(param) == factored;
    all.push_back(has_one && taken < tensors.size() ? tensors[taken] : Tensor());
    taken += has_one;
  }
  return all;
}

// The list must have been as long as it takes.
void check_length(const char* op, const char* name, TensorList tensors, TensorList params, bool factored) {
  const auto count =
      std::count_if(params.begin(), params.end(), [&](const Tensor& param) { return is_factored(param) == factored; });
  TORCH_CHECK_VALUE(static_cast<size_t>(count) == tensors.size(), "optim_ext::", op, ": params has ", count,
                    " tensors of ", factored ? "two or more dimensions" : "less than two dimensions", " but ", name,
                    " has ", tensors.size(), "; these lists must be equally long");
}

// Tensors in one piece of memory.
class Pool {
 public:
  Pool(TensorList like, at::TensorOptions options) : Pool(shapes_of(like), options) {}
  Pool(const std::vector<std::vector<int64_t>>& shapes, at::TensorOptions options) {
    int64_t total = 0;
    for (const auto& shape : shapes) total += c10::multiply_integers(shape);
    all = at::empty({total}, options);
    int64_t offset = 0;
    for (const auto& shape : shapes) {
      tensors.push_back(all.as_strided(shape, at::detail::defaultStrides(shape), offset));
      offset += tensors.back().numel();
    }
  }
  Tensor all;
  std::vector<Tensor> tensors;

 private:
  static std::vector<std::vector<int64_t>> shapes_of(TensorList tensors) {
    std::vector<std::vector<int64_t>> shapes;
    for (const Tensor& tensor : tensors) shapes.push_back(tensor.sizes().vec());
    return shapes;
  }
};

// The matrices a tensor consists of, to be reduced along their rows (dim 1) or columns (dim 2), counted from the last.
Fibers fibers_of(const Tensor& tensor, int64_t dim, const Tensor& results) {
  const int64_t along = tensor.size(-dim), inner = dim == 1 ? 1 : tensor.size(-1);
  return {tensor.const_data_ptr(),
          *storage_of(tensor.scalar_type()),
          tensor.numel() / (along * inner),
          along,
          inner,
          static_cast<double>(along),
          static_cast<double*>(results.mutable_data_ptr())};
}

// Reduces fibers to one result each, divided by the divisor they come with.
template <class Driver, class Reduction>
void reduce_all_fibers(at::Device device, std::vector<Fibers> tensors) {
  std::vector<Fibers> pieces;
  std::vector<Tensor> kept;
  for (Fibers& fibers : tensors) {
    const int64_t count = fibers.pieces();
    if (count == 1) continue;
    kept.push_back(
        at::empty({fibers.outer * count * fibers.inner}, at::TensorOptions().device(device).dtype(at::kDouble)));
    auto* const partial = static_cast<double*>(kept.back().mutable_data_ptr());
    pieces.push_back({partial, Storage::f64, fibers.outer, count, fibers.inner, fibers.divisor, fibers.results});
    fibers.results = partial;
    fibers.divisor = 1.0;
  }
  Driver::template reduce_fibers<Reduction>(device, tensors);
  if (!pieces.empty()) reduce_all_fibers<Driver, rules::Sum>(device, std::move(pieces));
}

// Parameters of one kind with their part of the lists: matrices have row_vars and col_vars, vectors variances.
struct Part {
  std::vector<Tensor> params, grads, row_vars, col_vars, variances, state_steps, averages;
  std::vector<int64_t> members;  // their places among all
};

// One step of one kind of parameters, everything checked.
template <class Driver>
struct AdafactorStep {
  const char* const op;
  const size_t members;
  const StepControls& controls;  // with what lies beside all of them
  const Tensor& lr;
  const rules::Adafactor options;

  // Counts steps of parameters without elements, which have nothing else to be done.
  void of_empty(const Part& part) const {
    const Members of(part.members);
    rules::AdafactorAverage<true> nothing{};
    run<Driver>(nothing,
                {.op = op,
                 .controls = controls.without_grads().without_average().with_companions(beside(of)),
                 .operands = {{"params", part.params}, {"grads", part.grads}},
                 .state_steps = TensorList(part.state_steps),
                 .takes_companions = true},
                {});
    for (const auto* state : {&part.row_vars, &part.col_vars, &part.variances}) {
      for (const Tensor& tensor : *state) {
        if (tensor.defined()) note_write(tensor);
      }
    }
  }

  void of_vectors(const Part& part) const {
    rules::AdafactorAverage<true> average{options.beta2_decay, 0.0};
    run<Driver>(average,
                {.op = op,
                 .controls = controls.without_average().with_companions({}),
                 .operands = {{"variances", part.variances}, {"grads", part.grads}},
                 .state_steps = TensorList(part.state_steps),
                 .counts = false},
                {});
    update<false>(part, part.variances, {}, controls.once_unscaled());
  }

  void of_matrices(const Part& part) const {
    average_squares(part);
    std::vector<Tensor> row_factors, col_factors;
    make_factors(part, row_factors, col_factors);
    for (size_t i = 0; i < part.params.size(); ++i) {
      row_factors[i] = row_factors[i].expand(part.params[i].sizes());
      col_factors[i] = col_factors[i].expand(part.params[i].sizes());
    }
    update<true>(part, row_factors, col_factors, controls);
  }

 private:
  // What lies beside the parameters of a part. Their state is kept as it is.
  TensorList beside(const Members& of) const { return of.of_each_kind(controls.companions, members); }

  at::TensorOptions doubles(const Part& part) const {
    return at::TensorOptions().device(part.params[0].device()).dtype(at::kDouble);
  }

  // Brings row_vars and col_vars up to date.
  void average_squares(const Part& part) const {
    const size_t count = part.params.size();
    std::vector<Tensor> averages = part.row_vars, steps = part.state_steps, grads;
    averages.insert(averages.end(), part.col_vars.begin(), part.col_vars.end());
    steps.insert(steps.end(), part.state_steps.begin(), part.state_steps.end());
    Pool means(averages, doubles(part));
    std::vector<Fibers> fibers;
    for (size_t i = 0; i < count; ++i) {
      grads.push_back(part.grads[i].contiguous());
      fibers.push_back(fibers_of(grads[i], 1, means.tensors[i]));
      fibers.push_back(fibers_of(grads[i], 2, means.tensors[count + i]));
    }
    reduce_all_fibers<Driver, rules::SumOfSquares>(part.params[0].device(), std::move(fibers));
    if (controls.grad_scale) means.all.div_(*controls.grad_scale).div_(*controls.grad_scale);
    if (controls.grad_factor) means.all.mul_(*controls.grad_factor).mul_(*controls.grad_factor);
    rules::AdafactorAverage<false> average{options.beta2_decay, 0.0};
    run<Driver>(average,
                {.op = op,
                 .controls = controls.without_grads().without_average().with_companions({}),
                 .operands = {{"averages", averages}, {"means", means.tensors}},
                 .state_steps = TensorList(steps),
                 .counts = false},
                {});
  }

  void make_factors(const Part& part, std::vector<Tensor>& of_rows, std::vector<Tensor>& of_columns) const {
    std::vector<Tensor> row_vars;
    for (size_t i = 0; i < part.params.size(); ++i) {
      const bool in_double = part.params[i].scalar_type() == at::kDouble || part.grads[i].scalar_type() == at::kDouble;
      const at::TensorOptions options = doubles(part).dtype(in_double ? at::kDouble : at::kFloat);
      of_rows.push_back(at::empty(part.row_vars[i].sizes(), options));
      of_columns.push_back(at::empty(part.col_vars[i].sizes(), options));
      row_vars.push_back(part.row_vars[i].contiguous());
    }
    const Pool means = means_of_matrices(part, row_vars);
    const StepControls none;
    rules::AdafactorFactor<true> row_factor{options.eps1};
    run<Driver>(row_factor,
                {.op = op,
                 .controls = none,
                 .operands = {{"row_factors", of_rows}, {"row_vars", part.row_vars}, {"means", means.tensors}}},
                {});
    rules::AdafactorFactor<false> col_factor{};
    run<Driver>(col_factor,
                {.op = op,
                 .controls = none,
                 .operands = {{"col_factors", of_columns}, {"col_vars", part.col_vars}, {"means", {}}}},
                {});
  }

  // The mean of each matrix's row_var, as wide as that.
  Pool means_of_matrices(const Part& part, const std::vector<Tensor>& row_vars) const {
    std::vector<Fibers> fibers;
    std::vector<std::vector<int64_t>> shapes;
    for (const Tensor& row_var : row_vars) {
      shapes.push_back(row_var.sizes().vec());
      shapes.back()[shapes.back().size() - 2] = 1;
    }
    Pool means(shapes, doubles(part));
    for (size_t i = 0; i < row_vars.size(); ++i) fibers.push_back(fibers_of(row_vars[i], 2, means.tensors[i]));
    reduce_all_fibers<Driver, rules::Sum>(part.params[0].device(), std::move(fibers));
    for (size_t i = 0; i < row_vars.size(); ++i) means.tensors[i] = means.tensors[i].expand(row_vars[i].sizes());
    return means;
  }

  // `first` and `second` are what adafactor_scale() takes.
  template <bool kFactored>
  void update(const Part& part, TensorList first, TensorList second, const StepControls& asked) const {
    Tensor rms = rms_before_clipping<kFactored>(part, first, second);
    if (asked.grad_scale) rms = rms.div(*asked.grad_scale);
    if (asked.grad_factor) rms = rms.mul(*asked.grad_factor);
    const Members of(part.members);
    const TensorList companions = beside(of);
    const Tensor of_params = root_mean_squares<Driver>(part.params, companions);
    using Rule = rules::AdafactorUpdate<kFactored>;
    Rule rule{options, 0.0, 0.0};
    const StepControls last = asked.with_averages(part.averages).with_companions(companions);
    const CallSpec spec{
        .op = op,
        .controls = last,
        .operands = {{"params", part.params}, {"grads", part.grads}, {"first", first}, {"second", second}},
        .state_steps = TensorList(part.state_steps),
        .takes_companions = true};
    Call call(spec, Rule::kOperands, Rule::kUsed, Rule::kUpdates);
    call.set({{"lr", rule.options.lr, lr}}, &rule, sizeof rule);
    call.commit();
    call.use_scalars(0, of_params.const_data_ptr<double>());
    call.use_scalars(1, rms.const_data_ptr<double>());
    Driver::run(rule, call);
  }

  template <bool kFactored>
  Tensor rms_before_clipping(const Part& part, TensorList first, TensorList second) const {
    using Reduction = rules::AdafactorRms<kFactored>;
    const Tensor one = at::full({}, options.largest_scale(), doubles(part));
    std::vector<Tensor> largest;
    for (const Tensor& grad : part.grads) largest.push_back(one.expand(grad.sizes()));
    const StepControls none;
    const CallSpec spec{
        .op = op,
        .controls = none,
        .operands = {{"grads", part.grads}, {"largest", largest}, {"first", first}, {"second", second}}};
    const Call call(spec, Reduction::kOperands, Reduction::kUsed, Reduction::kUpdates);
    Tensor results = at::empty({static_cast<int64_t>(part.grads.size())}, doubles(part));
    Driver::template reduce_each<Reduction>(call, results.template mutable_data_ptr<double>());
    return results;
  }
};

struct AdafactorRow : StepRow<rules::Adafactor> {
  static constexpr bool kTakesCompanions = true;

  template <class Driver>
  static void run(const StepArguments<Options>& given) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const TensorList params = given.lists[0];
    const auto rows = spread(given.lists[2], params, true), columns = spread(given.lists[3], params, true),
               moments = spread(given.lists[4], params, false);
    in_turns(given.op, given.controls, params, [&](const StepControls& controls, const Members& of) {
      const StepControls of_members = controls.with_companions(of.of_each_kind(controls.companions, params.size()));
      const StepArguments<Options> members{given.op,
                                           of_members,
                                           {of(params), of(given.lists[1]), of(TensorList(rows)),
                                            of(TensorList(columns)), of(TensorList(moments)), of(given.lists[5])},
                                           given.options,
                                           given.tensors};
      step_members<Driver>(members, given);
    });
  }

 private:
  // One step of these members, of all that are given. Their lists are of one length, with undefined tensors where a
  // parameter has no such state.
  template <class Driver>
  static void step_members(const StepArguments<Options>& chosen, const StepArguments<Options>& given) {
    const StepControls& controls = chosen.controls;
    const auto& [params, grads, rows, columns, moments, state_steps] = chosen.lists;
    Options options{};
    {
      // Everything is checked here; what follows only passes on parts of these lists.
      const CallSpec spec{.op = chosen.op,
                          .controls = controls,
                          .operands = {chosen.operand(0), chosen.operand(1)},
                          .state_steps = state_steps,
                          .partial = {{{"row_vars", rows}, 1}, {{"col_vars", columns}, 2}, {{"variances", moments}, 0}},
                          .takes_companions = true};
      Call checked(spec, 2, rules::all_operands(2), rules::operand_bit(0));
      checked.require_real();
      check_length(chosen.op, "row_vars", given.lists[2], given.lists[0], true);
      check_length(chosen.op, "col_vars", given.lists[3], given.lists[0], true);
      check_length(chosen.op, "variances", given.lists[4], given.lists[0], false);
      given.fill(checked, options);
      check_derived(checked, options, &options);
      if (CheckOnly::active() || checked.empty() || checked.skip) return;
    }
    const OverlapsChecked parts;
    const AdafactorStep<Driver> step{chosen.op, params.size(), controls, *given.tensors[0], options};
    Part matrices, vectors, empty;
    int64_t averages = 0;  // elements of row_var and col_var among the matrices
    for (size_t i = 0; i < params.size(); ++i) {
      if (is_factored(params[i])) {
        const int64_t more = rows[i].numel() + columns[i].numel();
        if (averages > 0 && averages + more > kMostAverages) {
          step.of_matrices(std::exchange(matrices, {}));
          averages = 0;
        }
        averages += more;
      }
      Part& part = params[i].numel() == 0 ? empty : is_factored(params[i]) ? matrices : vectors;
      part.params.push_back(params[i]);
      part.grads.push_back(grads[i]);
      part.row_vars.push_back(rows[i]);
      part.col_vars.push_back(columns[i]);
      part.variances.push_back(moments[i]);
      part.state_steps.push_back(state_steps[i]);
      if (!controls.averages.empty()) part.averages.push_back(controls.averages[i]);
      part.members.push_back(static_cast<int64_t>(i));
    }
    if (!matrices.params.empty()) step.of_matrices(matrices);
    if (!vectors.params.empty()) step.of_vectors(vectors);
    if (!empty.params.empty()) step.of_empty(empty);
  }
};

const RegisteredStepOp<"adafactor_", AdafactorRow> adafactor;

}  // namespace

}  // namespace optim_ext::ops
