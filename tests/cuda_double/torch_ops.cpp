// Torch's own operations on CUDA tensors, done by its CPU kernels over the same memory. Whatever torch has registered
// for CUDA is taken over but for what only makes or views memory. An operation that changes its arguments and makes
// nothing new is queued on the current stream, as a launch would be; one whose result has yet to be made waits for the
// device.
#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "runtime.h"

namespace {

using cuda_double::Kind;
using torch::jit::Stack;

// Memory is made and seen by torch's own code for CUDA; only what computes has to be replaced.
const std::unordered_set<std::string> kTorchsOwn = {
    "aten::empty",
    "aten::empty_strided",
    "aten::as_strided",
    "aten::view",
    "aten::_reshape_alias",
    "aten::unfold",
    "aten::view_as_real",
    "aten::view_as_complex",
    "aten::resize_",
    "aten::set_",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::record_stream",
    "aten::is_set_to",
    "aten::copy_",
    "aten::alias",
    "aten::_resize_output_",
    "aten::_local_scalar_dense",
    "aten::_efficientzerotensor",
};

// Operations of sparse tensors that optimizers need.
constexpr const char* kSparse[] = {"_coalesce",
                                   "_to_dense",
                                   "add.Tensor",
                                   "add_.Tensor",
                                   "add.out",
                                   "mul.Tensor",
                                   "clone",
                                   "neg",
                                   "zero_",
                                   "sum",
                                   "norm.ScalarOpt_dim_dtype",
                                   "isnan",
                                   "abs"};

// Those whose result's size is only known on the device, so that torch's own kernels wait, too.
const std::unordered_set<std::string> kWaiting = {"aten::nonzero",    "aten::masked_select", "aten::_unique2",
                                                  "aten::unique_dim", "aten::_coalesce",     "aten::equal",
                                                  "aten::is_nonzero"};

void tell_that_it_waits() {
  if (c10::cuda::warning_state().get_sync_debug_mode() != c10::cuda::SyncDebugMode::L_DISABLED) {
    c10::cuda::warn_or_error_on_sync();
  }
}

void copy_marks(const at::Tensor& from, at::Tensor& to) {
  if (from.is_conj()) to._set_conj(true);
  if (from.is_neg()) to._set_neg(true);
  if (from.unsafeGetTensorImpl()->is_wrapped_number()) to.unsafeGetTensorImpl()->set_wrapped_number(true);
}

// A tensor of the CPU over the memory of a tensor of a device, which it does not keep alive: neither would a kernel.
at::Tensor dense_alias(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {  // which the operation may want to make larger
    return at::empty_strided(tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.scalar_type()));
  }
  const c10::Storage& storage = tensor.unsafeGetTensorImpl()->storage();
  c10::Storage shared(c10::Storage::use_byte_size_t(), storage.nbytes(),
                      c10::DataPtr(const_cast<void*>(storage.data()), c10::kCPU), nullptr, false);
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  copy_marks(tensor, made);
  return made;
}

at::Tensor sparse_of(const at::Tensor& indices, const at::Tensor& values, const at::Tensor& like) {
  at::Tensor made = at::_sparse_coo_tensor_unsafe(indices, values, like.sizes());
  made._coalesced_(like.is_coalesced());
  return made;
}

// A new tensor of the device. Nothing is under way on it that could touch its memory.
at::Tensor on_device(const at::Tensor& result, c10::Device device) {
  if (result.is_sparse()) {
    return sparse_of(on_device(result._indices(), device), on_device(result._values(), device), result);
  }
  const at::Tensor dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
  at::Tensor made = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(device));
  if (dense.numel() > 0) {
    const cuda_double::Opened opened(1u << device.index());
    std::memcpy(made.data_ptr(), dense.data_ptr(), dense.nbytes());
  }
  copy_marks(result, made);
  return made;
}

// The arguments of an operation as its CPU kernel takes them, and the way back for its results.
class Translation {
 public:
  explicit Translation(bool for_later) : for_later_(for_later) {}

  c10::IValue arguments(const c10::IValue& value) {
    if (value.isTensor()) return alias(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(alias(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional<at::Tensor>(alias(*tensor)) : tensor);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = value.toDevice();
      return c10::Device(c10::kCPU);
    }
    return value.isGenerator() ? c10::IValue() : value;
  }

  c10::IValue results(const c10::IValue& value) const {
    if (value.isTensor()) return original(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(original(tensor));
    return list;
  }

  // Where the operation runs.
  c10::Device device() const { return device_ && device_->has_index() ? *device_ : current(); }
  unsigned devices() const { return devices_ | 1u << device().index(); }

  // What the operation has made larger.
  void resize_originals() const {
    for (const auto& [there, here] : pairs_) {
      if (there.is_sparse() || there.sizes() == here.sizes()) continue;
      there.resize_(here.sizes());
      const at::Tensor dense = here.contiguous();
      const cuda_double::Opened opened(1u << there.device().index());
      if (dense.numel() > 0) std::memcpy(there.data_ptr(), dense.data_ptr(), dense.nbytes());
    }
  }

  at::Tensor alias(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) return for_later_ ? snapshot(tensor) : tensor;
    if (!device_ || !device_->has_index()) device_ = tensor.device();
    devices_ |= 1u << tensor.device().index();
    for (const auto& [there, here] : pairs_) {
      if (there.is_same(tensor)) return here;
    }
    at::Tensor made = tensor.is_sparse()
                          ? sparse_of(dense_alias(tensor._indices()), dense_alias(tensor._values()), tensor)
                          : dense_alias(tensor);
    pairs_.emplace_back(tensor, made);
    return made;
  }

 private:
  static c10::Device current() { return {c10::kCUDA, c10::cuda::current_device()}; }

  // Of a tensor on the host, which may change before the stream gets there.
  static at::Tensor snapshot(const at::Tensor& tensor) {
    at::Tensor copy = tensor.clone();
    copy_marks(tensor, copy);
    return copy;
  }

  at::Tensor original(const at::Tensor& result) const {
    if (!result.defined()) return result;
    for (const auto& [there, here] : pairs_) {
      if (here.is_same(result)) return there;
    }
    for (const auto& [there, here] : pairs_) {
      if (result.is_sparse() || here.is_sparse() || !here.storage().data()) continue;
      if (here.storage().data() == result.storage().data() && here.dtype() == result.dtype()) {
        return at::as_strided(there, result.sizes(), result.strides(), result.storage_offset());
      }
    }
    return on_device(result, device());
  }

  const bool for_later_;
  std::optional<c10::Device> device_;
  unsigned devices_ = 0;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;  // on the device, and its alias
};

void run_on_cpu(const c10::OperatorHandle& op, Stack& stack) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_modes(c10::DispatchKeySet({c10::DispatchKey::Python}));
  op.callBoxed(stack);
}

// Whether all that comes of an operation is a change of its arguments, whose sizes it leaves alone.
bool only_changes_arguments(const c10::FunctionSchema& schema) {
  bool changes = false;
  for (const c10::Argument& argument : schema.arguments()) {
    if (argument.is_out()) return false;
    changes |= argument.alias_info() && argument.alias_info()->isWrite();
  }
  for (const c10::Argument& result : schema.returns()) {
    if (!result.alias_info() || !result.alias_info()->isWrite()) return false;
  }
  return changes;
}

// Torch's kernels for lists tell autograd of their writes themselves, where nobody else does.
void raise_versions(const c10::FunctionSchema& schema, const Stack& arguments) {
  if (schema.name().rfind("aten::_foreach_", 0) != 0) return;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* const info = schema.arguments()[i].alias_info();
    if (!info || !info->isWrite() || !arguments[i].isTensorList()) continue;
    for (const at::Tensor& tensor : arguments[i].toTensorVector()) {
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
}

// The arguments that the operation returns.
Stack returned_arguments(const c10::FunctionSchema& schema, const Stack& arguments) {
  Stack returned;
  for (const c10::Argument& result : schema.returns()) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::AliasInfo* const info = schema.arguments()[i].alias_info();
      if (!info || !info->isWrite() || *info != *result.alias_info()) continue;
      returned.push_back(arguments[i]);
      break;
    }
  }
  return returned;
}

void for_each_tensor(const Stack& values, const std::function<void(const at::Tensor&)>& work) {
  for (const c10::IValue& value : values) {
    if (value.isTensor() && value.toTensor().defined()) work(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) work(tensor);
    }
  }
}

// While a graph is captured: the same once more at each replay, into the results that there are.
void capture_again(const c10::OperatorHandle& op, const Stack& arguments, const Stack& results, unsigned devices,
                   cudaStream_t stream) {
  std::vector<at::Tensor> into;
  for_each_tensor(results, [&](const at::Tensor& tensor) { into.push_back(dense_alias(tensor)); });
  const auto replay = [op, arguments, into] {
    Stack stack = arguments;
    run_on_cpu(op, stack);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    size_t next = 0;
    for_each_tensor(stack, [&](const at::Tensor& made) { into[next++].copy_(made); });
  };
  cuda_double::enqueue(stream, Kind::kernel, op.schema().name(), replay, devices);
}

void on_double(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const auto given = torch::jit::last(*stack, schema.arguments().size());
  const bool queued = only_changes_arguments(schema);
  Translation translation(queued);
  Stack arguments;
  for (const c10::IValue& value : given) arguments.push_back(translation.arguments(value));
  const c10::cuda::CUDAGuard guard(translation.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const unsigned devices = translation.devices();
  Stack results;
  if (queued) {
    results = returned_arguments(schema, Stack(given.begin(), given.end()));
    const auto work = [op, arguments] {
      Stack copy = arguments;
      run_on_cpu(op, copy);
    };
    cuda_double::enqueue(stream, Kind::kernel, schema.name(), work, devices);
    raise_versions(schema, Stack(given.begin(), given.end()));
  } else {
    const bool capturing = cuda_double::capturing(stream);
    if (kWaiting.count(schema.name())) tell_that_it_waits();
    if (!capturing) cuda_double::finish_all();
    Stack run = arguments;
    {
      const cuda_double::Opened opened(devices);
      run_on_cpu(op, run);
    }
    translation.resize_originals();
    for (const c10::IValue& value : run) results.push_back(translation.results(value));
    if (capturing) {
      capture_again(op, arguments, results, devices, stream);
    } else {
      cuda_double::note(Kind::kernel, schema.name());
    }
  }
  torch::jit::drop(*stack, schema.arguments().size());
  for (c10::IValue& value : results) stack->push_back(std::move(value));
}

// Copies go along the runtime's own calls wherever torch would use these.
at::Tensor& copy_on_double(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  if (self.numel() == 0 && self.sizes() == from.sizes()) return self;
  const bool same_layout = !self.is_sparse() && !from.is_sparse() && self.dtype() == from.dtype() &&
                           self.sizes() == from.sizes() && self.strides() == from.strides() &&
                           self.is_non_overlapping_and_dense() && self.is_conj() == from.is_conj() &&
                           self.is_neg() == from.is_neg();
  if (same_layout) return at::native::copy_(self, from, non_blocking);
  TORCH_CHECK(!self.is_sparse() && !from.is_sparse(), "the double copies no sparse tensors");
  Translation translation(/*for_later=*/from.is_cpu());
  const at::Tensor source = translation.alias(from), target = self.is_cpu() ? self : translation.alias(self);
  const bool with_host = self.is_cpu() || from.is_cpu(), waits = with_host && (self.is_cpu() || !non_blocking);
  if (waits) tell_that_it_waits();
  const c10::cuda::CUDAGuard guard(self.is_cuda() ? self.device() : from.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  if (self.is_cuda() && from.is_cuda() && self.device() != from.device()) cuda_double::finish_all();
  const auto work = [target, source] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    target.copy_(source);
  };
  cuda_double::enqueue(stream, with_host ? Kind::copy : Kind::kernel, "aten::copy_", work, translation.devices());
  if (waits) C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  return self;
}

// Taking over an operation is what torch warns of.
struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

struct TakenOver {
  torch::Library dense{torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__};
  torch::Library sparse{torch::Library::IMPL, "aten", c10::DispatchKey::SparseCUDA, __FILE__, __LINE__};

  TakenOver() {
    Silent silent;
    const c10::WarningUtils::WarningHandlerGuard guard(&silent);
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
      if (name.name.rfind("aten::", 0) != 0) continue;
      const auto op = dispatcher.findSchema(name);
      if (!op || kTorchsOwn.count(name.name)) continue;
      const std::string own = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
      if (op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
        dense.impl(own.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_double>());
      }
      const bool wanted = std::find(std::begin(kSparse), std::end(kSparse), own) != std::end(kSparse);
      if (wanted && op->hasKernelForDispatchKey(c10::DispatchKey::SparseCUDA)) {
        sparse.impl(own.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_double>());
      }
    }
    dense.impl("copy_", &copy_on_double);
  }
};

const TakenOver& taken_over = *new TakenOver;  // for good

}  // namespace
