#include "lbfgs_op.h"

#include <ATen/ops/empty.h>

#include <bit>
#include <cmath>

#include "../kernels/history.h"
#include "../rules/lbfgs.h"
#include "drivers.h"
#include "../call/parallel.h"

namespace optim_ext::ops {

namespace {

// The flat vectors of one problem: dense, one-dimensional, of one length, on one device, all float or all double.
struct Vectors {
  const char* op;
  const Tensor& like;

  Vectors(const char* op, const Tensor& like, const char* name) : op(op), like(like) {
    TORCH_CHECK(like.dim() == 1 && like.is_contiguous() && like.layout() == at::kStrided, "optim_ext::", op, ": ", name,
                " must be a dense vector, found shape ", like.sizes());
    TORCH_CHECK(like.scalar_type() == at::kFloat || like.scalar_type() == at::kDouble, "optim_ext::", op, ": ", name,
                " has dtype ", like.scalar_type(), ", expected Float or Double");
  }

  int64_t numel() const { return like.numel(); }
  Storage storage() const { return *storage_of(like.scalar_type()); }
  int64_t checked(std::optional<int64_t> counted) const {
    if (!counted) return numel();
    TORCH_CHECK_VALUE(*counted == numel() || (*counted >= 0 && *counted < numel() && *counted % kHistoryTile == 0),
                      "optim_ext::", op, ": counted is ", *counted, ", expected a multiple of ", kHistoryTile,
                      " below the number of elements, or that, ", numel());
    return *counted;
  }

  void check(const Tensor& tensor, const char* name, at::ScalarType dtype) const {
    TORCH_CHECK(tensor.defined(), "optim_ext::", op, ": ", name, " is undefined");
    TORCH_CHECK(tensor.layout() == at::kStrided && tensor.is_contiguous() && tensor.sizes() == like.sizes(),
                "optim_ext::", op, ": ", name, " must be a dense vector of ", numel(), " elements, found shape ",
                tensor.sizes());
    TORCH_CHECK(tensor.device() == like.device(), "optim_ext::", op, ": ", name, " is on ", tensor.device(),
                ", expected ", like.device());
    TORCH_CHECK(tensor.scalar_type() == dtype, "optim_ext::", op, ": ", name, " has dtype ", tensor.scalar_type(),
                ", expected ", dtype);
  }
  const void* in(const Tensor& tensor, const char* name) const {
    check(tensor, name, like.scalar_type());
    return tensor.const_data_ptr();
  }
  const void* in(const OptionalTensor& tensor, const char* name) const {
    return tensor && tensor->defined() ? in(*tensor, name) : nullptr;
  }
};

// The rows of a history as pointers.
class Rows {
 public:
  Rows(const Vectors& vectors, TensorList old_dirs, TensorList old_stps, at::ScalarType dtype) {
    TORCH_CHECK_VALUE(old_dirs.size() == old_stps.size(), "optim_ext::", vectors.op, ": old_dirs has ", old_dirs.size(),
                      " tensors but old_stps has ", old_stps.size(), "; the lists must be equally long");
    TORCH_CHECK(dtype == vectors.like.scalar_type() || dtype == at::kBFloat16, "optim_ext::", vectors.op,
                ": a history of dtype ", dtype, " cannot be combined with vectors of dtype ",
                vectors.like.scalar_type());
    storage_ = *storage_of(dtype);
    dirs_.reserve(old_dirs.size() + 1);
    stps_.reserve(old_stps.size() + 1);
    for (const Tensor& row : old_dirs) add(vectors, row, "old_dirs", dtype, dirs_);
    for (const Tensor& row : old_stps) add(vectors, row, "old_stps", dtype, stps_);
  }
  void add_pair(const Tensor& y, const Tensor& s) {
    dirs_.push_back(y.mutable_data_ptr());
    stps_.push_back(s.mutable_data_ptr());
  }
  History get() const { return {dirs_.data(), stps_.data(), static_cast<int64_t>(dirs_.size()), storage_}; }

 private:
  static void add(const Vectors& vectors, const Tensor& row, const char* name, at::ScalarType dtype,
                  std::vector<void*>& to) {
    vectors.check(row, name, dtype);
    to.push_back(const_cast<void*>(row.const_data_ptr()));
  }
  std::vector<void*> dirs_, stps_;
  Storage storage_;
};

at::ScalarType dtype_of(TensorList rows, const Tensor& otherwise) {
  return rows.empty() || !rows[0].defined() ? otherwise.scalar_type() : rows[0].scalar_type();
}

Tensor results(const Tensor& like, int64_t count) { return at::empty({count}, like.options().dtype(at::kDouble)); }

int64_t real_numel(const Tensor& tensor) { return tensor.numel() * (tensor.is_complex() ? 2 : 1); }

// A parameter or gradient that takes part in a move, as dense memory in its logical order.
Storage moved_storage(const Tensor& tensor, const char* op, const char* name, size_t index, at::Device device) {
  TORCH_CHECK(tensor.defined() && tensor.layout() == at::kStrided, "optim_ext::", op, ": ", name, "[", index,
              "] must be a dense tensor");
  TORCH_CHECK(tensor.device() == device, "optim_ext::", op, ": ", name, "[", index, "] is on ", tensor.device(),
              ", expected ", device);
  const auto storage = storage_of(tensor.scalar_type());
  TORCH_CHECK(storage, "optim_ext::", op, ": ", name, "[", index, "] has dtype ", tensor.scalar_type(),
              ", expected a floating point or complex type");
  TORCH_CHECK(!tensor.is_conj() && !tensor.is_neg(), "optim_ext::", op, ": ", name, "[", index,
              "] is a lazy conjugate or negative view; call resolve_conj() and resolve_neg() on it");
  return *storage;
}

// The tensors of a move as the operand `k` of bundles, looked at on all threads. Operand data stays empty where a
// tensor is not dense.
Work moved_tensors(const char* op, const char* name, TensorList tensors, int k, bool is_written, at::Device device) {
  Work work;
  work.device = device;
  work.bundles.resize(tensors.size());
  over_tensors(device, static_cast<int64_t>(tensors.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tensor& tensor = tensors[i];
      Bundle& bundle = work.bundles[i] = Bundle{};
      bundle.storage[k] = moved_storage(tensor, op, name, i, device);
      bundle.in_double = bundle.storage[k] == Storage::f64;
      bundle.numel = real_numel(tensor);
      if (tensor.is_contiguous())
        bundle.data[k] = is_written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    }
  });
  return work;
}

// A part of one of the flat vectors.
void set_operand(Bundle& bundle, int k, const void* data, int64_t offset, Storage storage) {
  bundle.storage[k] = storage;
  if (data == nullptr) return;
  bundle.data[k] = static_cast<char*>(const_cast<void*>(data)) + offset * bytes_of(storage);
  bundle.in_double |= storage == Storage::f64;
}

// To 45 bits, so that a product with one of the 8 bits of bf16 is exact.
double rounded_for_bf16(double value) {
  const uint64_t dropped = (uint64_t{1} << 8) - 1;
  return std::isfinite(value) ? std::bit_cast<double>((std::bit_cast<uint64_t>(value) + (dropped + 1) / 2) & ~dropped)
                              : value;
}

}  // namespace

template <class Driver>
void lbfgs_gather_(const Tensor& flat, TensorList tensors, at::IntArrayRef offsets, bool negate) {
  const char* const op = "lbfgs_gather_";
  const Vectors vectors(op, flat, "flat");
  TORCH_CHECK_VALUE(tensors.size() == offsets.size(), "optim_ext::", op, ": tensors has ", tensors.size(),
                    " tensors but offsets has ", offsets.size(), " numbers; the lists must be equally long");
  Work work = moved_tensors(op, "tensors", tensors, 1, false, flat.device());
  std::vector<Tensor> dense;
  void* const to = flat.mutable_data_ptr();
  int64_t end = 0, covered = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Bundle& bundle = work.bundles[i];
    TORCH_CHECK_VALUE(offsets[i] >= end && bundle.numel <= flat.numel() - offsets[i], "optim_ext::", op, ": tensors[",
                      i, "] with ", bundle.numel, " elements has no room at ", offsets[i], " of ", flat.numel());
    end = offsets[i] + bundle.numel;
    covered += bundle.numel;
    set_operand(bundle, 0, to, offsets[i], vectors.storage());
    if (bundle.data[1] == nullptr && bundle.numel > 0)
      bundle.data[1] = const_cast<void*>(dense.emplace_back(tensors[i].contiguous()).const_data_ptr());
  }
  note_write(flat);
  if (covered != flat.numel()) flat.zero_();  // what belongs to tensors that are not there
  rules::Flatten rule{};
  rule.negate = negate;
  Driver::run(rule, work);
}

template <class Driver>
void lbfgs_displace_(TensorList params, const Tensor& d, const OptionalTensor& origin, double t) {
  const char* const op = "lbfgs_displace_";
  const Vectors vectors(op, d, "d");
  const void* const from = vectors.in(origin, "origin");
  Work work = moved_tensors(op, "params", params, 0, true, d.device());
  std::vector<std::pair<const Tensor&, Tensor>> copies;  // of parameters that are not dense
  const void* const direction = d.const_data_ptr();
  int64_t offset = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    Bundle& bundle = work.bundles[i];
    TORCH_CHECK_VALUE(bundle.numel <= d.numel() - offset, "optim_ext::", op,
                      ": params have more elements than d, which has ", d.numel());
    set_operand(bundle, 1, direction, offset, vectors.storage());
    set_operand(bundle, 2, from, offset, vectors.storage());
    if (bundle.data[0] == nullptr && bundle.numel > 0)
      bundle.data[0] = copies.emplace_back(params[i], params[i].contiguous()).second.mutable_data_ptr();
    offset += bundle.numel;
  }
  TORCH_CHECK_VALUE(offset == d.numel(), "optim_ext::", op, ": params have ", offset, " elements, d has ", d.numel());
  over_tensors(d.device(), static_cast<int64_t>(params.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) note_write(params[i]);
  });
  if (from != nullptr) {
    Driver::run(rules::Displace<true>{t}, work);
  } else {
    Driver::run(rules::Displace<false>{t}, work);
  }
  for (const auto& [param, moved] : copies) param.copy_(moved);
}

template <class Driver>
Tensor lbfgs_norms(const Tensor& vector, const OptionalTensor& other, std::optional<int64_t> counted) {
  const Vectors vectors("lbfgs_norms", vector, "vector");
  const NormsOf task{vectors.numel(), vectors.checked(counted), vectors.storage(), vector.const_data_ptr(),
                     vectors.in(other, "other")};
  Tensor out = results(vector, 3);
  Driver::norms(vector.device(), task, reinterpret_cast<Norms*>(out.mutable_data_ptr<double>()));
  return out;
}

template <class Driver>
Tensor lbfgs_dots(const Tensor& vector, TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric,
                  std::optional<int64_t> counted) {
  const Vectors vectors("lbfgs_dots", vector, "vector");
  const Rows rows(vectors, old_dirs, old_stps, dtype_of(old_dirs, vector));
  HistoryDots task{};
  task.history = rows.get();
  task.numel = vectors.numel();
  task.counted = vectors.checked(counted);
  task.value = vectors.storage();
  task.grad = vector.const_data_ptr();
  task.metric = vectors.in(metric, "metric");
  Tensor out = results(vector, task.sums());
  Driver::history_dots(vector.device(), task, out.mutable_data_ptr<double>());
  return out;
}

template <class Driver>
Tensor lbfgs_pair_(const Tensor& y, const Tensor& s, const Tensor& grad, const Tensor& prev_grad, const Tensor& d,
                   TensorList old_dirs, TensorList old_stps, const OptionalTensor& metric, double t, double grad_weight,
                   double prev_weight, std::optional<int64_t> counted) {
  const char* const op = "lbfgs_pair_";
  const Vectors vectors(op, grad, "grad");
  Rows rows(vectors, old_dirs, old_stps, y.scalar_type());
  vectors.check(y, "y", y.scalar_type());
  vectors.check(s, "s", y.scalar_type());
  rows.add_pair(y, s);
  HistoryDots task{};
  task.history = rows.get();
  task.numel = vectors.numel();
  task.counted = vectors.checked(counted);
  task.value = vectors.storage();
  task.grad = grad.const_data_ptr();
  task.metric = vectors.in(metric, "metric");
  task.with_difference = task.forms_pair = true;
  task.pair = {t, grad_weight, prev_weight};
  task.prev_grad = vectors.in(prev_grad, "prev_grad");
  task.d = vectors.in(d, "d");
  note_write(y);
  note_write(s);
  Tensor out = results(grad, task.sums());
  Driver::history_dots(grad.device(), task, out.mutable_data_ptr<double>());
  return out;
}

template <class Driver>
Tensor lbfgs_combine_(const Tensor& d, const Tensor& grad, TensorList old_dirs, TensorList old_stps,
                      const Tensor& coefficients, const OptionalTensor& metric, std::optional<int64_t> counted) {
  const char* const op = "lbfgs_combine_";
  const Vectors vectors(op, grad, "grad");
  const Rows rows(vectors, old_dirs, old_stps, dtype_of(old_dirs, grad));
  HistoryCombination task{};
  task.history = rows.get();
  task.numel = vectors.numel();
  task.counted = vectors.checked(counted);
  task.value = vectors.storage();
  task.grad = grad.const_data_ptr();
  task.metric = vectors.in(metric, "metric");
  vectors.check(d, "d", grad.scalar_type());
  task.d = d.mutable_data_ptr();
  const int64_t count = task.history.count;
  TORCH_CHECK(coefficients.is_cpu() && coefficients.scalar_type() == at::kDouble && coefficients.is_contiguous() &&
                  coefficients.numel() == 1 + 2 * count,
              "optim_ext::", op, ": coefficients must be ", 1 + 2 * count, " doubles on the CPU");
  const double* const given = coefficients.const_data_ptr<double>();
  std::vector<double> values(given, given + coefficients.numel());
  if (task.history.storage == Storage::bf16) {
    for (size_t i = 1; i < values.size(); ++i) values[i] = rounded_for_bf16(values[i]);
  }
  task.grad_coefficient = values[0];
  task.y_coefficient = values.data() + 1;
  task.s_coefficient = values.data() + 1 + count;
  note_write(d);
  Tensor out = results(grad, 3);
  Driver::history_combine(grad.device(), task, reinterpret_cast<Norms*>(out.mutable_data_ptr<double>()));
  return out;
}

OPTIM_EXT_INSTANTIATE_OP(lbfgs_gather_)
OPTIM_EXT_INSTANTIATE_OP(lbfgs_displace_)
OPTIM_EXT_INSTANTIATE_OP(lbfgs_norms)
OPTIM_EXT_INSTANTIATE_OP(lbfgs_dots)
OPTIM_EXT_INSTANTIATE_OP(lbfgs_pair_)
OPTIM_EXT_INSTANTIATE_OP(lbfgs_combine_)

}  // namespace optim_ext::ops
