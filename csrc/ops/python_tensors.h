// Tensors by their Python objects, which are remembered from step to step without being kept alive.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

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
// the GIL and on the thread that holds it: one object may stand in many places, so no two threads may count its owners.
class TakenTensors {
 public:
  TakenTensors() = default;
  TakenTensors(TakenTensors&& other) noexcept = default;
  TakenTensors(const TakenTensors&) = delete;
  ~TakenTensors() {
    for (std::vector<at::Tensor>& list : lists_) {
      for (at::Tensor& tensor : list) Traits::destroyBorrow(tensor);
    }
    for (PyObject* const object : objects_) Py_DECREF(object);
  }

  // False where an object is no longer what it was.
  bool take(const std::vector<const PythonTensors*>& from) {
    constexpr size_t kAhead = 16;
    size_t count = 0;
    for (const PythonTensors* const list : from) count += list->size();
    objects_.reserve(count);
    lists_.reserve(from.size());
    for (const PythonTensors* const list : from) {
      const auto& places = list->places_;
      std::vector<at::Tensor>& tensors = lists_.emplace_back(places.size());
      for (size_t i = 0; i < places.size(); ++i) {
        if (i + kAhead < places.size()) __builtin_prefetch(places[i + kAhead].object, 1);
        if (!places[i].is_same()) return false;
        if (places[i].object != nullptr) {
          Py_INCREF(places[i].object);
          objects_.push_back(places[i].object);
        }
        Traits::assignBorrow(tensors[i], places[i].tensor());
      }
    }
    return true;
  }
  at::TensorList get(size_t k) const { return lists_[k]; }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  std::vector<std::vector<at::Tensor>> lists_;
  std::vector<PyObject*> objects_;
};

}  // namespace optim_ext::ops
