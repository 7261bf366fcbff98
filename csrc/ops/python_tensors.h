// Tensors by their Python objects, which are remembered from step to step without being kept alive.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"

namespace optim_ext::ops {

// Where tensors are. They are not owned: whoever drops or replaces one finds its memory freed at once. The caller makes
// sure that the objects are still there (that a live container has them) before he asks for what they are.
class PythonTensors {
 public:
  // null: an undefined tensor.
  void add(PyObject* tensor) { places_.push_back({tensor, tensor ? Py_TYPE(tensor) : nullptr, {}}); }
  // A tensor that Python does not know, which is owned.
  void add_own(const at::Tensor& tensor) { places_.push_back({nullptr, nullptr, tensor}); }
  size_t size() const { return places_.size(); }

  // Whether the objects are what they were, and `is_good` says so of each tensor.
  template <class IsGood>
  bool are_all(const IsGood& is_good) const {
    for (const Place& place : places_) {
      if (!place.is_same() || !is_good(place.tensor())) return false;
    }
    return true;
  }

 private:
  friend class TakenTensors;
  struct Place {
    PyObject* object;
    PyTypeObject* type;
    at::Tensor own;
    // Another object may have come to lie at the same address.
    bool is_same() const { return object == nullptr || Py_TYPE(object) == type; }
    const at::Tensor& tensor() const { return object ? THPVariable_Unpack(object) : own; }
  };
  std::vector<Place> places_;
};

// The tensors themselves while a step works on them: lists of one length, or empty. Their Python objects are owned
// meanwhile, as the step lets other threads run; that is cheaper than owning tensors. Made, filled and destroyed with
// the GIL, which the threads that share this work do without: nothing else runs Python meanwhile, and an object's last
// owner lets go of it in the caller.
class TakenTensors {
 public:
  TakenTensors() = default;
  TakenTensors(TakenTensors&& other) noexcept = default;
  TakenTensors(const TakenTensors&) = delete;
  ~TakenTensors() {
    for (std::vector<at::Tensor>& list : lists_) {
      for (at::Tensor& tensor : list) Traits::destroyBorrow(tensor);
    }
    over_tensors(device_, count_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * width_; i < end * width_; ++i) {
        if (objects_[i] == nullptr || Py_REFCNT(objects_[i]) == 1) continue;
        Py_DECREF(objects_[i]);
        objects_[i] = nullptr;
      }
    });
    for (PyObject* const object : objects_) Py_XDECREF(object);
  }

  // For work on `device`. False where an object is no longer what it was.
  bool take(const std::vector<const PythonTensors*>& from, at::Device device) {
    constexpr int64_t kAhead = 8;
    std::vector<size_t> filled;
    device_ = device;
    lists_.resize(from.size());
    for (size_t k = 0; k < from.size(); ++k) {
      if (from[k]->size() == 0) continue;
      filled.push_back(k);
      count_ = static_cast<int64_t>(from[k]->size());
      lists_[k].resize(count_);
    }
    width_ = static_cast<int64_t>(filled.size());
    objects_.resize(width_ * count_, nullptr);
    std::atomic<bool> same = true;
    over_tensors(device, count_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t w = 0; w < width_; ++w) {
          const auto& places = from[filled[w]]->places_;
          if (i + kAhead < end) __builtin_prefetch(places[i + kAhead].object, 1);
          if (!places[i].is_same()) {
            same = false;
            return;
          }
          Py_XINCREF(places[i].object);
          objects_[i * width_ + w] = places[i].object;
          Traits::assignBorrow(lists_[filled[w]][i], places[i].tensor());
        }
      }
    });
    return same;
  }
  at::TensorList get(size_t k) const { return lists_[k]; }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  at::Device device_ = at::kCPU;
  std::vector<std::vector<at::Tensor>> lists_;
  int64_t width_ = 0, count_ = 0;   // lists that are not empty, and what they hold
  std::vector<PyObject*> objects_;  // element by element, list by list
};

}  // namespace optim_ext::ops
