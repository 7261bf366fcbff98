// The host path of an averaged model: from two modules to calls of average_ without a Python loop.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

namespace optim_ext::ops {

// Averages and the parameters they follow, on one device.
class AveragePairs {
 public:
  void add(const at::Tensor& average, const at::Tensor& param);
  // One call of average_. Parameters on another device are copied to that of the averages first.
  void run(const at::Tensor& weight, const std::optional<at::Tensor>& found_inf, bool check_only) const;
  c10::Device device() const { return averages_[0].device(); }
  bool is_in_place() const;  // no average has been moved to another device

 private:
  std::vector<at::Tensor> averages_, params_;
  c10::Device device_ = at::kCPU;
};

// Adds the class AveragePlan to the module.
void bind_average_plan(pybind11::module_& m);

}  // namespace optim_ext::ops
