#include "step_run.h"

#include "../ops/run_average.h"

namespace optim_ext::ops {

void StepRun::run(const PlannedCall& call, const Gathered& gathered, const std::vector<HyperValue>& hypers,
                  bool check_only) const {
  if (!gathered.grads.empty()) step_members(call, gathered, hypers, check_only);
  if (averages(call) && !gathered.all) average_idle(call, gathered, check_only);
}

void StepRun::step_members(const PlannedCall& call, const Gathered& gathered, const std::vector<HyperValue>& hypers,
                           bool check_only) const {
  std::vector<TensorList> lists(op_.lists.size());
  std::vector<std::vector<Tensor>> subsets(gathered.all ? 0 : lists.size());
  const auto taking_part = [&](TensorList all) {
    std::vector<Tensor> subset;
    for (const int64_t member : gathered.members) subset.push_back(all[member]);
    return subset;
  };
  for (size_t k = 0; k < lists.size(); ++k) {
    const TensorList all = gathered.taken.get(k);
    if (call.partial.contains(k)) {
      subsets.resize(lists.size());
      subsets[k] = gathered.all ? all.vec() : taking_part(all);
      std::erase_if(subsets[k], [](const Tensor& tensor) { return !tensor.defined(); });
      lists[k] = subsets[k];
    } else if (k == kGrads) {
      lists[k] = gathered.grads;
    } else if (gathered.all) {
      lists[k] = all;
    } else {
      if (!all.empty()) subsets[k] = taking_part(all);
      lists[k] = subsets[k];
    }
  }
  StepControls here{moved_to(call.device, controls_.grad_scale), moved_to(call.device, controls_.found_inf),
                    moved_to(call.device, controls_.grad_factor)};
  std::vector<Tensor> averages_of_members;
  if (averages(call)) {
    const TensorList all = gathered.taken.get(call.lists.size());
    if (!gathered.all) averages_of_members = taking_part(all);
    here.averages = gathered.all ? all : averages_of_members;
    here.average_weight = weight_for(call.device, *controls_.average_weight);
  }
  std::vector<Tensor> companions;  // of all kinds
  for (size_t kind = 0; kind < call.companions.size(); ++kind) {
    const TensorList all = gathered.taken.get(call.lists.size() + 1 + kind);
    const std::vector<Tensor> of_kind = gathered.all ? all.vec() : taking_part(all);
    companions.insert(companions.end(), of_kind.begin(), of_kind.end());
  }
  here.companions = companions;
  naming(call, gathered.members, [&] {
    const py::gil_scoped_release no_gil;
    op_.run(lists, hypers.data(), here, check_only);
  });
}

// Parameters without a gradient stay as they are, but their averages still move towards them.
void StepRun::average_idle(const PlannedCall& call, const Gathered& gathered, bool check_only) const {
  std::vector<Tensor> idle_averages, params;
  for (const int64_t i : gathered.idle) {
    idle_averages.push_back(gathered.taken.get(call.lists.size())[i]);
    params.push_back(gathered.taken.get(kParams)[i]);
  }
  naming(call, gathered.idle,
         [&] { run_average(idle_averages, params, *controls_.average_weight, controls_.found_inf, check_only); });
}

// A list of the op as users know what is in it: by the key under which a parameter's state has it.
std::string StepRun::name_of(const PlannedCall& call, const std::string& list) const {
  for (size_t k = 0; k < call.keys.size(); ++k) {
    if (op_.lists[kFirstState + k].name == list) return call.keys[k];
  }
  for (size_t kind = 0; kind < call.companion_keys.size(); ++kind) {
    if (list == kCompanions[kind]) return call.companion_keys[kind];
  }
  return list;
}

}  // namespace optim_ext::ops
