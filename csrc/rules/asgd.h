#pragma once

#include "rule.h"
#include "table.h"

namespace optim_ext::rules {

// Averaged SGD (Polyak & Juditsky 1992), with the step sizes torch.optim.ASGD uses: a step takes eta and mu as the step
// before left them.
struct ASGD {
  static constexpr int kOperands = 3;  // param, grad, ax
  static constexpr unsigned kUsed = all_operands(3);
  static constexpr unsigned kUpdates = kUsed & ~operand_bit(1);
  static constexpr int kScalars = 2;  // eta, mu

  double lr, lambd, alpha, t0, weight_decay;
  bool maximize, counts_in_double;  // torch computes the new eta and mu with the precision of its step counts
  double eta_now, mu_now;           // filled in by at_step

  static constexpr List kLists[] = {
      params(), grads(), scalar(1, "mus", "mu"), operand(2, "axs", "ax"), scalar(0, "etas", "eta"), steps()};
  static constexpr Field<ASGD> kFields[] = {tensor_or(number("lr", &ASGD::lr)),
                                            number("lambd", &ASGD::lambd),
                                            number("alpha", &ASGD::alpha),
                                            number("t0", &ASGD::t0),
                                            number("weight_decay", &ASGD::weight_decay),
                                            flag("maximize", &ASGD::maximize)};
  static constexpr Derived<ASGD> kDerived[] = {finite_scalar("the next eta", 0, &ASGD::lr, &ASGD::lambd, &ASGD::alpha)};
  static constexpr bool ASGD::* kCountsInDouble = &ASGD::counts_in_double;

  OPTIM_EXT_RULE ASGD at_step(double step, Scalar* scalars) const {
    ASGD rule = *this;
    Scalar &eta = scalars[0], &mu = scalars[1];
    rule.eta_now = eta.value;
    rule.mu_now = mu.value;
    eta.value = rounded(lr / real_power(1.0 + lambd * lr * step, alpha), counts_in_double);
    mu.value = rounded(1.0 / (step - t0 > 1.0 ? step - t0 : 1.0), counts_in_double);
    return rule;
  }

  template <class V>
  OPTIM_EXT_RULE void operator()(V& param, V grad, V& ax) const {
    const V g = regularized(grad, param, maximize, V(weight_decay));
    param = V(1.0 - lambd * eta_now) * param - V(eta_now) * g;
    ax = V(mu_now) != V(1) ? ax + (param - ax) * V(mu_now) : param;
  }
};

}  // namespace optim_ext::rules
