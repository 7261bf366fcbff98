// Calls whose members share memory: taken apart into calls that follow one another, and calls found sound remembered.
#pragma once

#include <deque>
#include <utility>
#include <vector>

#include "call.h"

namespace optim_ext::ops {

// For each turn the members that have it, by their places in the lists.
using MembersInTurn = std::vector<std::vector<int64_t>>;

// What a call throws whose members overlap. It is bad input for who does not catch it.
class InTurn : public BadInput {
 public:
  InTurn(const std::string& op, const std::string& list, int64_t index, const std::string& problem, MembersInTurn turns)
      : BadInput(op, list, index, problem), turns(std::move(turns)) {}
  MembersInTurn turns;
};

// Picks the members of one turn from every list among an op's arguments; empty lists stay so.
class Members {
 public:
  Members() = default;
  explicit Members(const std::vector<int64_t>& chosen) : chosen_(&chosen) {}

  at::TensorList operator()(at::TensorList list) const {
    if (chosen_ == nullptr || list.empty()) return list;
    std::vector<at::Tensor>& picked = picked_.emplace_back();
    for (const int64_t i : *chosen_) picked.push_back(list[i]);
    return picked;
  }
  // The same from a list of several kinds, those of all members of one kind following each other.
  at::TensorList of_each_kind(at::TensorList list, size_t members) const {
    if (chosen_ == nullptr || list.empty()) return list;
    std::vector<at::Tensor>& picked = picked_.emplace_back();
    for (size_t kind = 0; kind < list.size() / members; ++kind) {
      for (const int64_t i : *chosen_) picked.push_back(list[kind * members + static_cast<size_t>(i)]);
    }
    return picked;
  }
  template <class Argument>
  const Argument& operator()(const Argument& other) const {
    return other;
  }

 private:
  const std::vector<int64_t>* chosen_ = nullptr;  // null: all
  mutable std::deque<std::vector<at::Tensor>> picked_;
};

// While one of these lives, calls of this thread are parts of one whose overlaps have been looked at.
class OverlapsChecked {
 public:
  OverlapsChecked();
  ~OverlapsChecked();
  OverlapsChecked(const OverlapsChecked&) = delete;
  static bool active();
};

}  // namespace optim_ext::ops
