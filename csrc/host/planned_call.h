// One of the calls a step consists of: where its tensors are, and the tensors themselves while a step works on them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../call/known_calls.h"
#include "python_tensors.h"

namespace optim_ext::ops {

// Among the lists of an op.
constexpr size_t kParams = 0, kGrads = 1, kFirstState = 2;

struct PlannedCall {
  size_t group;
  size_t spec;  // whose hyper-parameters it takes
  c10::Device device;
  std::vector<int64_t> indices;      // into group["params"], for messages
  std::vector<PythonTensors> lists;  // params, (grads: empty), state...; an absent list is empty
  bool takes_sparse, takes_dense;
  std::vector<std::string> keys = {};  // of the state lists, for messages
  std::vector<uint8_t> ready = {};     // whether the state of a parameter is there
  PythonTensors averages = {};         // of the parameters; empty where they are not averaged
  std::set<size_t> partial = {};       // lists with undefined tensors, which the op is not given
  std::unique_ptr<KnownCalls> known = std::make_unique<KnownCalls>();
  std::vector<PythonTensors> companions = {};    // of the parameters, by kind
  std::vector<std::string> companion_keys = {};  // under which the state has them, by kind
  bool is_averaged() const { return averages.size() > 0; }
};

// A call's tensors for one step.
struct Gathered {
  TakenTensors taken;  // the call's lists, and last the averages and the companions
  bool all = true;     // every parameter takes part: the lists serve as they are
  std::vector<at::Tensor> grads;
  std::vector<int64_t> members;  // into the lists, where not all take part
  std::vector<int64_t> idle;     // the others: without a gradient there is nothing to do but to average
};

// Takes the tensors and their gradients. False where a plan cannot serve: state still to be made, a gradient or
// parameter of another kind.
bool gather(const PlannedCall& call, Gathered& out);

}  // namespace optim_ext::ops
