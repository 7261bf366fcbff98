// at_step of a rule, for a program.
#pragma once

#include "../rules/rule.h"

namespace optim_ext {

template <class Rule>
void at_step_of(const void* given, double step, rules::Scalar* scalars, void* ready) {
  const Rule& rule = *static_cast<const Rule*>(given);
  if constexpr (rules::kScalarsOf<Rule> == 0) {
    *static_cast<Rule*>(ready) = rule.at_step(step);
  } else {
    *static_cast<Rule*>(ready) = rule.at_step(step, scalars);
  }
}

}  // namespace optim_ext
