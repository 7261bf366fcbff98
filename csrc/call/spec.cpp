#include "spec.h"

#include "tensors.h"

namespace optim_ext::ops {

BadInput::BadInput(const std::string& op, const std::string& list, int64_t index, const std::string& problem)
    : c10::Error(text("optim_ext::", op, ": ", list, index < 0 ? "" : text("[", index, "]"), " ", problem),
                 c10::Backtrace()),
      list(list),
      problem(problem),
      index(index) {}

BadHyper::BadHyper(const std::string& problem, bool divides)
    : c10::ValueError(problem, c10::Backtrace()), divides(divides) {}

std::string hyper_name(const char* key, int index) { return index < 0 ? key : text(key, "[", index, "]"); }

void check_average_weight(const char* op, const char* name, double weight) {
  TORCH_CHECK_VALUE(weight >= 0.0 && weight <= 1.0, "optim_ext::", op, ": ", name, " is ", weight,
                    ", expected a number from 0 to 1");
}

}  // namespace optim_ext::ops
