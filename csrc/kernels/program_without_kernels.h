// What a rule's program says of it, for whoever adds the kernels.
#pragma once

#include "program.h"

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

template <class Rule>
constexpr RuleProgram program_without_kernels() {
  static_assert(sizeof(Rule) <= kMaxRuleBytes && Rule::kOperands <= kMaxOperands);
  static_assert(rules::kScalarsOf<Rule> <= kMaxScalars);
  return {sizeof(Rule),
          Rule::kOperands,
          Rule::kUsed,
          Rule::kUpdates,
          rules::kScalarsOf<Rule>,
          rules::kStoresScalars<Rule>,
          &at_step_of<Rule>,
          {}};
}

}  // namespace optim_ext
