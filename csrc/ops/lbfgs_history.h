// What L-BFGS remembers of one problem from one iteration to the next, as one object: its history with the dot products
// of all rows, the direction, the gradients, and the memory of them all. No Python here (lbfgs_python.h).
#pragma once

#include <utility>
#include <vector>

#include "../kernels/history.h"
#include "lbfgs_gram.h"
#include "vector_pool.h"

namespace optim_ext::ops {

// What a call of the closure gave: the gradient as one vector, with its norms and its product with the direction.
struct LbfgsEvaluation {
  Vector grad;
  Norms norms;
  double loss;  // where it was to be read together with the norms
};

// How an iteration begins.
struct LbfgsStart {
  bool anew;           // with an empty history, along the gradient
  double last_length;  // of the step before, along the direction before
  std::optional<double> damping;
  bool keeps_origin;        // the point it begins at is needed later
  std::optional<double> t;  // moves that far along the direction, if
  double least_slope;       // the slope is no larger than this (or NaN),
  bool only_if_finite;      // and, where asked for, all of it is finite
  OptionalTensor is_held;   // elements that are at a bound, and stay there in this iteration
};

struct LbfgsDeparture {
  double largest, slope;  // of the direction: its largest magnitude, and its product with the gradient
  bool moved;
};

// Vectors are one process's parts of longer ones: of their first `counted` elements sums are taken, and put together
// over the process groups (name and size), one after the other. The rest are copies of what another process counts.
struct LbfgsParts {
  int64_t counted;
  std::vector<std::pair<std::string, int64_t>> groups;
};

class LbfgsHistory {
 public:
  // Vectors of `numel` elements of `dtype`, rows of `row_dtype`. `metric` multiplies the initial inverse Hessian;
  // elements [begin, end) in `held` never move.
  LbfgsHistory(int64_t numel, at::ScalarType dtype, at::ScalarType row_dtype, at::Device device, int64_t history_size,
               OptionalTensor metric, std::vector<std::pair<int64_t, int64_t>> held, std::optional<LbfgsParts> parts);

  // Goes on from these tensors, which are its own of the last time or come from elsewhere. Oldest rows first.
  void take_up(const std::vector<Tensor>& old_dirs, const std::vector<Tensor>& old_stps, const OptionalTensor& d,
               const OptionalTensor& prev_grad);
  // Its rows are as they are now: what writes to them from here on is seen by take_up().
  void remember();
  // Nothing that was handed out is written again.
  void disown();

  // Takes the gradients in, each at its offset, and their norms. A loss on the same device is read together with them;
  // of parts it is the mean over the processes.
  LbfgsEvaluation evaluate(TensorList grads, at::IntArrayRef offsets, bool negate, bool along_direction,
                           const OptionalTensor& loss);
  // The last step joins the history, whose oldest pair goes if it has `history_size`, and the next direction is formed.
  LbfgsDeparture depart(const LbfgsEvaluation& here, TensorList params, int64_t history_size, const LbfgsStart& start);
  void forget();
  // A step of no length from `here`, for a state whose history is gone.
  void stand_still(const LbfgsEvaluation& here);
  // The step before has ended there, too.
  void set_previous(const LbfgsEvaluation& here) { prev_grad_ = here.grad; }

  // Moves the parameters t along the direction, from the origin or from where they are; to the origin; to a point.
  void move(TensorList params, double t, bool from_origin) const;
  void move_to_origin(TensorList params) const { move_to(params, origin_->tensor()); }
  void move_to(TensorList params, const Tensor& point) const;
  Tensor read(TensorList params) const;

  // Keeps a copy of a point, and goes back there.
  void note_best(const LbfgsEvaluation& here, TensorList params);
  LbfgsEvaluation go_to_best(TensorList params);

  int64_t pairs() const { return gram_.count(); }
  int64_t vectors() const;  // that it has memory for
  const std::vector<Tensor>& old_dirs() const { return dirs_.tensors; }
  const std::vector<Tensor>& old_stps() const { return stps_.tensors; }
  OptionalTensor d() const { return tensor_of(d_); }
  OptionalTensor prev_grad() const { return tensor_of(prev_grad_); }
  Tensor origin() const { return origin_->tensor(); }
  // torch's ro, al and H_diag.
  const std::vector<Tensor>& ro() const { return ro_; }
  const std::vector<Tensor>& al() const { return al_; }
  const Tensor& h_diag() const { return h_diag_; }
  void update_numbers();

 private:
  struct Rows {
    std::vector<Vector> owners;
    std::vector<Tensor> tensors;

    void push_back(Vector row);
    void pop_front();
    void clear();
  };
  static OptionalTensor tensor_of(const Vector& vector);
  bool is_own(const std::vector<Tensor>& old_dirs, const std::vector<Tensor>& old_stps, const OptionalTensor& d,
              const OptionalTensor& prev_grad) const;
  void add_pair(const LbfgsEvaluation& here, const Tensor& grad, int64_t history_size, const LbfgsStart& start);
  std::pair<double, double> damped_weights(const Tensor& grad, const LbfgsStart& start) const;
  Norms norms(const Tensor& vector, const OptionalTensor& other) const;
  std::optional<int64_t> counted() const;
  Tensor of_all_processes(const Tensor& numbers) const;
  Norms all_norms(const Tensor& norms) const;
  std::vector<double> all_dots(const Tensor& dots) const;
  void read(TensorList params, const Tensor& into) const;

  const at::TensorOptions options_;  // of vectors
  const int64_t numel_;
  const OptionalTensor metric_;
  const std::vector<std::pair<int64_t, int64_t>> held_;
  const std::optional<LbfgsParts> parts_;
  std::shared_ptr<VectorPool> vectors_, row_vectors_;

  Rows dirs_, stps_;
  std::vector<int64_t> versions_;  // of the rows when they were last remembered
  LbfgsGram gram_;
  Vector d_, prev_grad_, origin_, best_point_, best_grad_;
  std::vector<Tensor> ro_;  // pair by pair; undefined where it has not been asked for
  Tensor al_memory_, h_diag_;
  std::vector<Tensor> al_;  // one after the other in that memory
};

}  // namespace optim_ext::ops
