#include "step_ops.h"

#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <map>
#include <sstream>

namespace optim_ext::ops {

namespace {

std::vector<const StepOp*>& registered() {
  static std::vector<const StepOp*> ops;
  return ops;
}

std::map<std::string, const StepOp*>& all_by_name() {
  static std::map<std::string, const StepOp*> ops;
  return ops;
}

const char* type_of(HyperKind kind) {
  switch (kind) {
    case HyperKind::number: return "float";
    case HyperKind::tensor: return "Tensor";
    case HyperKind::flag: return "bool";
    case HyperKind::whole: return "int";
  }
  return nullptr;
}

}  // namespace

StepOp::StepOp(const char* name, std::vector<rules::List> lists, std::vector<HyperInfo> hypers, bool is_element_wise,
               bool takes_companions)
    : name(name),
      lists(std::move(lists)),
      hypers(std::move(hypers)),
      is_element_wise(is_element_wise),
      takes_companions(takes_companions) {
  registered().push_back(this);
  all_by_name().emplace(name, this);
}

StepOp::StepOp(Unlisted, const char* name, std::vector<rules::List> lists, std::vector<HyperInfo> hypers)
    : name(name), lists(std::move(lists)), hypers(std::move(hypers)), is_element_wise(true), takes_companions(true) {
  all_by_name().emplace(name, this);
}

const StepOp& StepOp::named(const std::string& name) { return *all_by_name().at(name); }

std::vector<const StepOp*> StepOp::all() {
  std::vector<const StepOp*> ops = registered();
  std::sort(ops.begin(), ops.end(), [](const StepOp* a, const StepOp* b) { return std::strcmp(a->name, b->name) < 0; });
  return ops;
}

// Gradients are marked as written because GradScaler's grad_scale unscales them in place, as torch's fused optimizers
// do; without it they are only read.
c10::FunctionSchema StepOp::schema() const {
  std::ostringstream text;
  text << name << '(';
  char alias = 'a';
  for (const rules::List& list : lists) text << "Tensor(" << alias++ << "!)[] " << list.name << ", ";
  text << '*';
  for (const HyperInfo& hyper : hypers) text << ", " << type_of(hyper.kind) << ' ' << hyper.name;
  return step_schema(text.str());
}

// `averages` and `companions` are empty where they are not given: the text of a schema cannot say that of a list of
// tensors.
c10::FunctionSchema step_schema(const std::string& own) {
  const std::string text = own +
                           ", Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_factor=None, "
                           "Tensor(y!)[] averages, Tensor? average_weight=None, Tensor(z!)[] companions) -> ()";
  const c10::FunctionSchema parsed = torch::schema(text.c_str());
  std::vector<c10::Argument> arguments = parsed.arguments();
  for (c10::Argument& argument : arguments) {
    if (argument.name() != "averages" && argument.name() != "companions") continue;
    argument = c10::Argument(argument.name(), argument.type(), argument.N(), c10::List<at::Tensor>(), true,
                             argument.alias_info() ? std::optional(*argument.alias_info()) : std::nullopt);
  }
  return parsed.cloneWithArguments(std::move(arguments));
}

void DerivedProblem::add(const char* key, int index, double value) {
  if (from_.empty()) is_asked_for_ = !std::isfinite(value);
  std::ostringstream out;
  out << (from_.empty() ? "" : ", ") << hyper_name(key, index) << " = " << value;
  from_ += out.str();
  has_zero_ |= value == 0.0;
}

void DerivedProblem::refuse() const {
  if (is_asked_for_ && !is_strict_) return;
  std::ostringstream out;
  out << "optim_ext::" << op_ << ": at step " << step_ << " " << name_ << " would be "
      << (std::isnan(value_) ? NAN : value_) << ", with " << from_;
  // An infinite quotient, or one of two zeros; any other NaN is the root of a negative number.
  throw BadHyper(out.str(), std::isinf(value_) || has_zero_);
}

}  // namespace optim_ext::ops
