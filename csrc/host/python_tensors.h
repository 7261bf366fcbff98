// Tensors by their Python objects, which are remembered from step to step without being kept alive.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace optim_ext::ops {

// Where tensors are. They are not owned: whoever drops or replaces one finds its memory freed at once. The caller makes
// sure that the objects are still there (that a live container has them) before he asks for what they are.
class PythonTensors {
 public:
  // null: an undefined tensor.
  void add(PyObject* tensor) { places_.push_back({tensor, tensor ? Py_TYPE(tensor) : nullptr}); }
  // A tensor that Python does not know, which is owned.
  void add_own(const at::Tensor& tensor) {
    add(nullptr);
    own_.resize(places_.size());
    own_.back() = tensor;
  }
  size_t size() const { return places_.size(); }
  // Null where there is none, or where the tensor is one that Python does not know.
  PyObject* object(size_t i) const { return places_[i].object; }

  // Whether the objects are what they were, and `is_good` says so of each tensor.
  template <class IsGood>
  bool are_all(const IsGood& is_good) const {
    for (size_t i = 0; i < size(); ++i) {
      if (!places_[i].is_same() || !is_good(tensor(i))) return false;
    }
    return true;
  }

 private:
  friend class TakenTensors;
  struct Place {
    PyObject* object;
    PyTypeObject* type;
    // Another object may have come to lie at the same address.
    bool is_same() const { return object == nullptr || Py_TYPE(object) == type; }
  };
  const at::Tensor& tensor(size_t i) const {
    static const at::Tensor undefined;
    if (places_[i].object != nullptr) return THPVariable_Unpack(places_[i].object);
    return i < own_.size() ? own_[i] : undefined;
  }

  std::vector<Place> places_;
  std::vector<at::Tensor> own_;  // by place; as long as the last of these asks for
};

// The tensors themselves while a step works on them: lists of one length, or empty. Their Python objects are owned
// meanwhile, as the step lets other threads run; that is cheaper than owning tensors. Made, filled and destroyed with
// the GIL and on the thread that holds it: one object may stand in many places, so no two threads may count its owners.
// What the tensors were taken from outlives this.
class TakenTensors {
 public:
  TakenTensors() = default;
  TakenTensors(TakenTensors&&) noexcept = default;
  TakenTensors(const TakenTensors&) = delete;
  ~TakenTensors() {
    for (const PythonTensors* const list : from_) {
      for (const PythonTensors::Place& place : list->places_) {
        if (taken_-- == 0) return;
        Py_XDECREF(place.object);
      }
    }
  }

  // False where an object is no longer what it was.
  bool take(std::vector<const PythonTensors*> from) {
    constexpr size_t kAhead = 16;
    size_t count = 0;
    for (const PythonTensors* const list : from) count += list->size();
    borrowed_ = std::make_unique_for_overwrite<Borrowed[]>(count);
    from_ = std::move(from);
    for (const PythonTensors* const list : from_) {
      begins_.push_back(taken_);
      const auto& places = list->places_;
      for (size_t i = 0; i < places.size(); ++i, ++taken_) {
        if (i + kAhead < places.size()) __builtin_prefetch(places[i + kAhead].object, 1);
        if (!places[i].is_same()) return false;
        Py_XINCREF(places[i].object);
        ::new (&borrowed_[taken_]) at::Tensor(Traits::createBorrow(list->tensor(i)));
      }
    }
    return true;
  }
  at::TensorList get(size_t k) const {
    return {reinterpret_cast<const at::Tensor*>(&borrowed_[begins_[k]]), from_[k]->size()};
  }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  // A tensor that is not destroyed, as it does not own what it refers to.
  struct alignas(at::Tensor) Borrowed {
    std::byte memory[sizeof(at::Tensor)];
  };
  std::vector<const PythonTensors*> from_;
  std::vector<size_t> begins_;  // of each list in what follows
  std::unique_ptr<Borrowed[]> borrowed_;
  size_t taken_ = 0;
};

}  // namespace optim_ext::ops
