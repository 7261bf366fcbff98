// Memory for many vectors of one length, used again.
#pragma once

#include <memory>
#include <vector>

#include "ops.h"

namespace optim_ext::ops {

class VectorPool;

// A vector and the pool it goes back to when its last owner lets go of it, if it has one.
class PooledVector {
 public:
  explicit PooledVector(Tensor tensor) : tensor_(std::move(tensor)) {}
  PooledVector(Tensor tensor, std::shared_ptr<VectorPool> pool, int64_t loan)
      : tensor_(std::move(tensor)), pool_(std::move(pool)), loan_(loan) {}
  PooledVector(const PooledVector&) = delete;
  ~PooledVector();

  const Tensor& tensor() const { return tensor_; }
  // Whether its memory is that pool's to use again, so that it may be written.
  bool is_of(const VectorPool& pool) const;

 private:
  Tensor tensor_;
  std::shared_ptr<VectorPool> pool_;
  int64_t loan_ = 0;
};

using Vector = std::shared_ptr<PooledVector>;

inline Vector vector_from_elsewhere(Tensor tensor) { return std::make_shared<PooledVector>(std::move(tensor)); }

class VectorPool : public std::enable_shared_from_this<VectorPool> {
 public:
  // About `count` vectors are needed. On the CPU large ones are allocated together, in huge pages.
  VectorPool(int64_t numel, at::ScalarType dtype, at::Device device, int64_t count);

  Vector take();
  // Everything that is out stays with its takers: it is not used again.
  void disown() {
    ++loan_;
    out_ = 0;
  }
  at::ScalarType dtype() const { return options_.dtype().toScalarType(); }
  // Vectors that are out or ready.
  int64_t size() const { return out_ + static_cast<int64_t>(ready_.size()); }

 private:
  friend class PooledVector;

  int64_t numel_, at_once_;
  at::TensorOptions options_;
  std::vector<Tensor> ready_;
  int64_t loan_ = 0, out_ = 0;  // the number of this round of loans, and how many of it are out
};

}  // namespace optim_ext::ops
