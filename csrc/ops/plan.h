// The host path: from an optimizer's Python objects to op calls without a Python loop.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"
#include "ops.h"

namespace optim_ext::ops {

namespace py = pybind11;

// Python values as the arguments of an op.
template <class T>
T from_python(PyObject* value);
template <>
bool from_python<bool>(PyObject* value);
template <>
double from_python<double>(PyObject* value);
template <>
int64_t from_python<int64_t>(PyObject* value);
template <>
Tensor from_python<Tensor>(PyObject* value);

// The weight of an average as an op on `device` takes it: a number the host knows stays on the host.
Tensor weight_for(c10::Device device, const Tensor& weight);

// The tensors every op takes besides its own arguments.
struct CommonTensors {
  OptionalTensor grad_scale, found_inf, grad_factor;
  TensorList averages;
  OptionalTensor average_weight;
  static constexpr size_t kCount = 5, kLists = 1;
};

// Calls `body` for Python: C++ exceptions as torch's own bindings raise them (ValueError, OutOfMemoryError, ...).
template <class Body>
auto as_torch_raises(const Body& body) {
  try {
    return body();
  } catch (const py::error_already_set&) {
    throw;
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    throw py::error_already_set();
  }
}

// What a plan needs of an op: how many leading arguments are lists, how to check a call and how to make it.
struct PlannedOp {
  virtual ~PlannedOp() = default;
  virtual size_t lists() const = 0;
  virtual const std::string& list_name(size_t list) const = 0;
  virtual size_t hypers() const = 0;  // arguments between the lists and those every op has
  virtual void run(const std::vector<TensorList>& lists, PyObject* hypers, const CommonTensors& common,
                   bool check_only) const = 0;
};

// An op by its C++ signature. Calls go through the dispatcher with a typed handle, so that profilers, modes and
// autograd see them and nothing is boxed; checks alone go straight to the function.
template <auto... kKernels>
class TypedPlannedOp;

template <class... Args, void (*kCpu)(Args...), void (*... kOthers)(Args...)>
class TypedPlannedOp<kCpu, kOthers...> final : public PlannedOp {
  static constexpr size_t kArguments = sizeof...(Args);
  static constexpr size_t kLists =
      (0 + ... + (std::is_same_v<std::decay_t<Args>, TensorList> ? 1 : 0)) - CommonTensors::kLists;
  static constexpr size_t kHypers = kArguments - kLists - CommonTensors::kCount;
  template <size_t I>
  using Argument = std::decay_t<std::tuple_element_t<I, std::tuple<Args...>>>;

 public:
  explicit TypedPlannedOp(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<void(Args...)>()) {}

  size_t lists() const override { return kLists; }
  const std::string& list_name(size_t list) const override { return handle_.schema().arguments()[list].name(); }
  size_t hypers() const override { return kHypers; }

  void run(const std::vector<TensorList>& lists, PyObject* hypers, const CommonTensors& common,
           bool check_only) const override {
    run_with(std::make_index_sequence<kLists>{}, std::make_index_sequence<kHypers>{}, lists, hypers, common,
             check_only);
  }

 private:
  template <size_t... L, size_t... H>
  void run_with(std::index_sequence<L...>, std::index_sequence<H...>, const std::vector<TensorList>& lists,
                PyObject* hypers, const CommonTensors& common, bool check_only) const {
    const std::tuple<Argument<kLists + H>...> values{from_python<Argument<kLists + H>>(PyTuple_GET_ITEM(hypers, H))...};
    py::gil_scoped_release no_gil;
    if (check_only) {
      const CheckOnly guard;
      constexpr void (*kernels[])(Args...) = {kCpu, kOthers...};
      kernels[sizeof...(kOthers) > 0 && lists[0][0].is_cuda() ? sizeof...(kOthers) : 0](
          lists[L]..., std::get<H>(values)..., common.grad_scale, common.found_inf, common.grad_factor, common.averages,
          common.average_weight);
    } else {
      handle_.call(lists[L]..., std::get<H>(values)..., common.grad_scale, common.found_inf, common.grad_factor,
                   common.averages, common.average_weight);
    }
  }

  c10::TypedOperatorHandle<void(Args...)> handle_;
};

template <auto... kKernels>
std::shared_ptr<PlannedOp> planned(const char* name) {
  return std::make_shared<TypedPlannedOp<kKernels...>>(name);
}

using PlannedOps = std::map<std::string, std::shared_ptr<PlannedOp>>;

// Adds the class Plan to the module.
void bind_plan(py::module_& m, PlannedOps ops);

}  // namespace optim_ext::ops
