#include "lbfgs_history.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/sub.h>

#include <cmath>
#include <cstring>

namespace optim_ext::ops {

namespace {

// torch's: pairs of less curvature than this do not join the history.
constexpr double kLeastCurvature = 1e-10;

template <class Signature>
auto op_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void gather(const Tensor& flat, TensorList tensors, at::IntArrayRef offsets, bool negate) {
  static const auto op = op_named<void(const Tensor&, TensorList, at::IntArrayRef, bool)>("optim_ext::lbfgs_gather_");
  op.call(flat, tensors, offsets, negate);
}

void displace(TensorList params, const Tensor& d, const OptionalTensor& origin, double t) {
  static const auto op =
      op_named<void(TensorList, const Tensor&, const OptionalTensor&, double)>("optim_ext::lbfgs_displace_");
  op.call(params, d, origin, t);
}

// Of the elements that are counted, where not all are.
using Counted = std::optional<int64_t>;

Tensor norms_of(const Tensor& vector, const OptionalTensor& other, Counted counted) {
  static const auto op = op_named<Tensor(const Tensor&, const OptionalTensor&, Counted)>("optim_ext::lbfgs_norms");
  return op.call(vector, other, counted);
}

Tensor dots(const Tensor& vector, TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric,
            Counted counted) {
  static const auto op =
      op_named<Tensor(const Tensor&, TensorList, TensorList, const OptionalTensor&, Counted)>("optim_ext::lbfgs_dots");
  return op.call(vector, old_dirs, old_stps, metric, counted);
}

Tensor make_pair(const Tensor& y, const Tensor& s, const Tensor& grad, const Tensor& prev_grad, const Tensor& d,
                 TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric, double t,
                 const std::pair<double, double>& weights, Counted counted) {
  static const auto op =
      op_named<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, TensorList, TensorList,
                      const OptionalTensor&, double, double, double, Counted)>("optim_ext::lbfgs_pair_");
  return op.call(y, s, grad, prev_grad, d, old_dirs, old_stps, metric, t, weights.first, weights.second, counted);
}

Tensor combine(const Tensor& d, const Tensor& grad, TensorList old_dirs, TensorList old_stps,
               const Tensor& coefficients, const OptionalTensor& metric, Counted counted) {
  static const auto op = op_named<Tensor(const Tensor&, const Tensor&, TensorList, TensorList, const Tensor&,
                                         const OptionalTensor&, Counted)>("optim_ext::lbfgs_combine_");
  return op.call(d, grad, old_dirs, old_stps, coefficients, metric, counted);
}

// Those of all processes of a group, by torch.distributed: one after the other, in the order of ranks.
Tensor gathered(const Tensor& numbers, const std::string& group, int64_t size) {
  static const auto gather =
      c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::all_gather_into_tensor", "");
  static const auto wait = c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  torch::jit::Stack stack;
  torch::jit::push(stack, numbers, size, group);
  gather.callBoxed(stack);
  wait.callBoxed(stack);
  return torch::jit::pop(stack).toTensor();
}

Tensor on_the_host(const std::vector<double>& numbers) {
  Tensor tensor = at::empty({static_cast<int64_t>(numbers.size())}, at::kDouble);
  std::memcpy(tensor.mutable_data_ptr(), numbers.data(), numbers.size() * sizeof(double));
  return tensor;
}

Norms norms_in(const double* numbers) { return {numbers[0], numbers[1], numbers[2]}; }

int64_t version_of(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

bool are_same(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Tensor& x, const Tensor& y) { return x.is_same(y); });
}

}  // namespace

void LbfgsHistory::Rows::push_back(Vector row) {
  tensors.push_back(row->tensor());
  owners.push_back(std::move(row));
}

void LbfgsHistory::Rows::pop_front() {
  tensors.erase(tensors.begin());
  owners.erase(owners.begin());
}

void LbfgsHistory::Rows::clear() {
  tensors.clear();
  owners.clear();
}

LbfgsHistory::LbfgsHistory(int64_t numel, at::ScalarType dtype, at::ScalarType row_dtype, at::Device device,
                           int64_t history_size, OptionalTensor metric, std::vector<std::pair<int64_t, int64_t>> held,
                           std::optional<LbfgsParts> parts)
    : options_(at::TensorOptions(dtype).device(device)),
      numel_(numel),
      metric_(std::move(metric)),
      held_(std::move(held)),
      parts_(std::move(parts)) {
  constexpr int64_t kVectors = 6;
  const bool are_alike = dtype == row_dtype;
  const int64_t rows = 2 * std::min(history_size, int64_t{1} << 40);
  vectors_ = std::make_shared<VectorPool>(numel, dtype, device, kVectors + (are_alike ? rows : 0));
  row_vectors_ = are_alike ? vectors_ : std::make_shared<VectorPool>(numel, row_dtype, device, rows);
}

OptionalTensor LbfgsHistory::tensor_of(const Vector& vector) {
  return vector == nullptr ? std::nullopt : OptionalTensor(vector->tensor());
}

std::optional<int64_t> LbfgsHistory::counted() const { return parts_ ? std::optional(parts_->counted) : std::nullopt; }

// On the host, a row for each process. Waits for the device.
Tensor LbfgsHistory::of_all_processes(const Tensor& numbers) const {
  Tensor all = numbers;
  if (parts_) {
    for (const auto& [group, size] : parts_->groups) all = gathered(all, group, size);
  }
  return all.cpu().view({-1, numbers.numel()});
}

Norms LbfgsHistory::all_norms(const Tensor& norms) const {
  const Tensor all = of_all_processes(norms);
  return total(reinterpret_cast<const Norms*>(all.const_data_ptr<double>()), all.size(0));
}

std::vector<double> LbfgsHistory::all_dots(const Tensor& dots) const {
  std::vector<double> sums(static_cast<size_t>(dots.numel()));
  if (sums.empty()) return sums;
  const Tensor all = of_all_processes(dots);
  total(all.const_data_ptr<double>(), all.size(0), all.size(1), sums.data());
  return sums;
}

Norms LbfgsHistory::norms(const Tensor& vector, const OptionalTensor& other) const {
  return all_norms(norms_of(vector, other, counted()));
}

bool LbfgsHistory::is_own(const std::vector<Tensor>& old_dirs, const std::vector<Tensor>& old_stps,
                          const OptionalTensor& d, const OptionalTensor& prev_grad) const {
  const auto is_same = [](const OptionalTensor& given, const Vector& vector) {
    return given ? vector != nullptr && given->is_same(vector->tensor()) : vector == nullptr;
  };
  if (!is_same(d, d_) || !is_same(prev_grad, prev_grad_)) return false;
  if (!are_same(old_dirs, dirs_.tensors) || !are_same(old_stps, stps_.tensors)) return false;
  auto version = versions_.begin();
  for (const auto* const rows : {&old_dirs, &old_stps}) {
    for (const Tensor& row : *rows) {
      if (version == versions_.end() || version_of(row) != *version++) return false;
    }
  }
  return true;
}

void LbfgsHistory::take_up(const std::vector<Tensor>& old_dirs, const std::vector<Tensor>& old_stps,
                           const OptionalTensor& d, const OptionalTensor& prev_grad) {
  if (is_own(old_dirs, old_stps, d, prev_grad)) return;
  disown();
  forget();
  if (d) d_ = vector_from_elsewhere(*d);
  if (prev_grad) prev_grad_ = vector_from_elsewhere(*prev_grad);
  for (size_t i = 0; i < old_dirs.size(); ++i) {
    dirs_.push_back(vector_from_elsewhere(old_dirs[i]));
    stps_.push_back(vector_from_elsewhere(old_stps[i]));
    gram_.append(
        all_dots(dots(old_dirs[i].to(options_.dtype()), dirs_.tensors, stps_.tensors, metric_, counted())).data());
  }
  ro_.resize(old_dirs.size());
  remember();
}

void LbfgsHistory::remember() {
  versions_.clear();
  for (const auto* const rows : {&dirs_.tensors, &stps_.tensors}) {
    for (const Tensor& row : *rows) versions_.push_back(version_of(row));
  }
}

void LbfgsHistory::disown() {
  vectors_->disown();
  row_vectors_->disown();
  al_memory_.reset();
}

int64_t LbfgsHistory::vectors() const {
  return vectors_->size() + (row_vectors_ == vectors_ ? 0 : row_vectors_->size());
}

void LbfgsHistory::forget() {
  dirs_.clear();
  stps_.clear();
  ro_.clear();
  gram_ = LbfgsGram();
  d_.reset();
  prev_grad_.reset();
}

void LbfgsHistory::stand_still(const LbfgsEvaluation& here) {
  d_ = vector_from_elsewhere(here.grad->tensor().neg());
  prev_grad_ = here.grad;
}

LbfgsEvaluation LbfgsHistory::evaluate(TensorList grads, at::IntArrayRef offsets, bool negate, bool along_direction,
                                       const OptionalTensor& loss) {
  LbfgsEvaluation found{vectors_->take(), {}, std::nan("")};
  const Tensor& grad = found.grad->tensor();
  gather(grad, grads, offsets, negate);
  const Tensor norms = norms_of(grad, along_direction ? tensor_of(d_) : std::nullopt, counted());
  if (!loss) {
    found.norms = all_norms(norms);
    return found;
  }
  const Tensor all = of_all_processes(at::cat({loss->detach().reshape({1}).to(at::kDouble), norms}));
  const int64_t processes = all.size(0);
  std::vector<Norms> of_each;
  double sum = 0.0;
  for (const auto* row = all.const_data_ptr<double>(); processes > static_cast<int64_t>(of_each.size()); row += 4) {
    sum += row[0];
    of_each.push_back(norms_in(row + 1));
  }
  found.loss = sum / static_cast<double>(processes);
  found.norms = total(of_each.data(), processes);
  return found;
}

LbfgsDeparture LbfgsHistory::depart(const LbfgsEvaluation& here, TensorList params, int64_t history_size,
                                    const LbfgsStart& start) {
  const Tensor grad = start.is_held ? here.grad->tensor().masked_fill(*start.is_held, 0.0) : here.grad->tensor();
  if (start.anew) {
    forget();
  } else {
    add_pair(here, grad, history_size, start);
  }
  d_ = vectors_->take();
  prev_grad_ = here.grad;
  const Tensor& d = d_->tensor();
  Tensor of_d = combine(d, grad, dirs_.tensors, stps_.tensors, on_the_host(gram_.coefficients()), metric_, counted());
  if (start.is_held) d.masked_fill_(*start.is_held, 0.0);
  // Steps from when the rate of a group was another one may lead where it is zero.
  for (const auto& [begin, end] : held_) d.slice(0, begin, end).zero_();
  if (start.is_held || !held_.empty()) of_d = norms_of(d, grad, counted());
  if (start.keeps_origin) {
    if (origin_ == nullptr) origin_ = vectors_->take();
    read(params, origin_->tensor());
  }
  const Norms norms = all_norms(of_d);
  // Compared in the dtype of the parameters, as the search does it.
  const double slope = d.scalar_type() == at::kFloat ? static_cast<float>(norms.product) : norms.product;
  const bool is_flat = slope > start.least_slope;
  const bool is_finite = std::isfinite(norms.product) && std::isfinite(norms.largest);
  const bool moves = start.t && !is_flat && (is_finite || !start.only_if_finite);
  if (moves) move(params, *start.t, start.keeps_origin);
  return {norms.largest, norms.product, moves};
}

// The memory of the direction and of the gradient before becomes that of the new rows, if it may be written.
void LbfgsHistory::add_pair(const LbfgsEvaluation& here, const Tensor& grad, int64_t history_size,
                            const LbfgsStart& start) {
  Tensor prev_grad = prev_grad_->tensor();
  const Tensor& d = d_->tensor();
  std::pair<double, double> weights{1.0, 1.0};
  const bool reuses = !start.is_held && prev_grad_->is_of(*row_vectors_) && d_->is_of(*row_vectors_);
  if (start.is_held) {  // a difference is learnt from where a parameter has moved only
    prev_grad = at::sub(here.grad->tensor(), prev_grad);
    prev_grad.masked_fill_(d.eq(0.0), 0.0);
    weights = {0.0, -1.0};
  } else if (start.damping) {
    weights = damped_weights(grad, start);
  }
  Vector y = reuses ? prev_grad_ : row_vectors_->take(), s = reuses ? d_ : row_vectors_->take();
  const Tensor products = make_pair(y->tensor(), s->tensor(), grad, prev_grad, d, dirs_.tensors, stps_.tensors, metric_,
                                    start.last_length, weights, counted());
  const bool was_full = gram_.count() == history_size;
  const bool joins = gram_.push(all_dots(products).data(), history_size, kLeastCurvature);
  d_.reset();
  prev_grad_.reset();
  if (!joins) return;
  if (was_full) {
    dirs_.pop_front();
    stps_.pop_front();
    ro_.erase(ro_.begin());
  }
  dirs_.push_back(std::move(y));
  stps_.push_back(std::move(s));
  ro_.emplace_back();
}

// Powell's. What he mixes in, B s, is -t times the gradient before, as d is minus its product with H.
std::pair<double, double> LbfgsHistory::damped_weights(const Tensor& grad, const LbfgsStart& start) const {
  const double t = start.last_length, damping = *start.damping;
  const double before = norms(prev_grad_->tensor(), d_->tensor()).product, after = norms(grad, d_->tensor()).product;
  const double sy = t * (after - before), sbs = -t * t * before;
  if (!(sbs > 0.0 && sy < damping * sbs)) return {1.0, 1.0};
  const double theta = (1.0 - damping) * sbs / (sbs - sy);
  return {theta, theta + (1.0 - theta) * t};
}

void LbfgsHistory::move(TensorList params, double t, bool from_origin) const {
  displace(params, d_->tensor(), from_origin ? tensor_of(origin_) : std::nullopt, t);
}

void LbfgsHistory::move_to(TensorList params, const Tensor& point) const { displace(params, point, point, 0.0); }

void LbfgsHistory::read(TensorList params, const Tensor& into) const {
  std::vector<int64_t> offsets;
  int64_t offset = 0;
  for (const Tensor& param : params) {
    offsets.push_back(offset);
    offset += param.numel() * (param.is_complex() ? 2 : 1);
  }
  gather(into, params, offsets, false);
}

Tensor LbfgsHistory::read(TensorList params) const {
  Tensor point = at::empty({numel_}, options_);
  read(params, point);
  return point;
}

void LbfgsHistory::note_best(const LbfgsEvaluation& here, TensorList params) {
  if (best_point_ == nullptr) {
    best_point_ = vectors_->take();
    best_grad_ = vectors_->take();
  }
  read(params, best_point_->tensor());
  best_grad_->tensor().copy_(here.grad->tensor());
}

LbfgsEvaluation LbfgsHistory::go_to_best(TensorList params) {
  move_to(params, best_point_->tensor());
  LbfgsEvaluation there{vectors_->take(), {}, std::nan("")};
  there.grad->tensor().copy_(best_grad_->tensor());
  there.norms = norms(there.grad->tensor(), std::nullopt);
  return there;
}

// A pair's ro is the same as long as it is there. The numbers in al change with every iteration, in their place where
// nobody else may have them.
void LbfgsHistory::update_numbers() {
  const int64_t count = gram_.count();
  std::vector<double> numbers;
  for (int64_t i = 0; i < count; ++i) {
    if (!ro_[i].defined()) numbers.push_back(1.0 / gram_.curvature(i));
  }
  numbers.push_back(gram_.h_diag());
  const std::vector<Tensor> made = on_the_host(numbers).to(options_).unbind();
  auto next = made.begin();
  for (Tensor& ro : ro_) {
    if (!ro.defined()) ro = *next++;
  }
  h_diag_ = *next;
  if (!al_memory_.defined() || al_memory_.numel() != count) {
    al_memory_ = at::empty({count}, options_);
    al_ = al_memory_.unbind();
  }
  numbers.clear();
  for (int64_t i = 0; i < count; ++i) numbers.push_back(gram_.alpha(i));
  al_memory_.copy_(on_the_host(numbers));
}

}  // namespace optim_ext::ops
