#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Muon (Jordan et al. 2024): the momentum of a matrix, orthogonalized by iterations of Newton and Schulz, is the step.
struct Muon {
  double lr, weight_decay, momentum;
  bool nesterov;
  double ns_a, ns_b, ns_c, eps;
  int64_t ns_steps;
  bool match_rms_adamw;

  static constexpr List kLists[] = {params(), grads(), operand(2, "momentum_buffers", "momentum_buffer")};
  static constexpr Field<Muon> kFields[] = {tensor_or(number("lr", &Muon::lr)),
                                            number("weight_decay", &Muon::weight_decay),
                                            number("momentum", &Muon::momentum),
                                            flag("nesterov", &Muon::nesterov),
                                            number("ns_a", &Muon::ns_a, "ns_coefficients", 0),
                                            number("ns_b", &Muon::ns_b, "ns_coefficients", 1),
                                            number("ns_c", &Muon::ns_c, "ns_coefficients", 2),
                                            number("eps", &Muon::eps),
                                            whole("ns_steps", &Muon::ns_steps),
                                            flag("match_rms_adamw", &Muon::match_rms_adamw)};

  // What the rate of a matrix is multiplied by: such that its step has the root mean square of AdamW's, or by how much
  // it is taller than wide.
  double lr_ratio(double rows, double columns) const {
    if (match_rms_adamw) return 0.2 * root(rows > columns ? rows : columns);
    return root(rows > columns ? rows / columns : 1.0);
  }

  // Moves the singular values of wide matrices of norm one or less towards one, in the precision they are in:
  // X <- a X + (b A + c A A) X with A = X X'. gram(X) is X X', and combined(p, X, q, Y, Z) is p X + q Y Z.
  template <class Matrices, class Gram, class Combined>
  Matrices orthogonalized(Matrices x, const Gram& gram, const Combined& combined) const {
    for (int64_t i = 0; i < ns_steps; ++i) {
      const Matrices a = gram(x);
      x = combined(ns_a, x, 1.0, combined(ns_b, a, ns_c, a, a), x);
    }
    return x;
  }
};

// Its element-wise parts: the momentum that is to be orthogonalized, and the step along the result.
struct MuonMomentum {
  static constexpr int kOperands = 3;  // update (written only), grad, momentum_buffer
  static constexpr unsigned kUsed = all_operands(3);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);

  double momentum;
  bool nesterov;
  double share;  // filled in by at_step: of the momentum in the update, the rest being the gradient

  OPTIM_EXT_RULE MuonMomentum at_step(double) const {
    MuonMomentum rule = *this;
    rule.share = nesterov ? momentum : 1.0;
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& update, V grad, V& momentum_buffer) const {
    momentum_buffer = lerp(momentum_buffer, grad, V(1.0 - momentum));
    update = lerp(grad, momentum_buffer, V(share));
  }
};

struct MuonUpdate {
  static constexpr int kOperands = 2;  // param, orthogonal update
  static constexpr unsigned kUsed = all_operands(2);
  static constexpr unsigned kUpdates = operand_bit(0);

  double lr, weight_decay, lr_ratio;

  OPTIM_EXT_RULE MuonUpdate at_step(double) const { return *this; }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V update) const {
    param = V(shrinkage(lr, weight_decay)) * param - V(lr * lr_ratio) * update;
  }
};

}  // namespace optim_ext::rules
