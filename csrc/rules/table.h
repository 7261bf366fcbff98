// What a rule says of itself, once: the names of the lists of tensors and of the hyper-parameters an op takes for it.
// The op's schema and C++ signature, the checks of its arguments, the order in which Python hands them over and the
// rows of the tests are all made from these tables (ops/step_op.h).
//
// A rule with an op has
//   kLists    the lists of tensors in the order of the schema;
//   kFields   its hyper-parameters in that order;
//   kDerived  what at_step makes of them that may turn out not to be a number to compute with; may be missing.
#pragma once

#include <cstdint>

namespace optim_ext::rules {

// A list of tensors, one for each parameter, and the key of state_dict under which Python keeps it.
struct List {
  enum class Role : uint8_t {
    operand,  // what the rule's call operator takes, number `place`
    scalar,   // one number of state, number `place` of those at_step takes
    partial,  // a tensor that only some parameters have
    steps     // the count of steps
  };
  const char* name;
  const char* key;
  Role role;
  int8_t place;
};
constexpr List params() { return {"params", nullptr, List::Role::operand, 0}; }
constexpr List grads() { return {"grads", nullptr, List::Role::operand, 1}; }
constexpr List operand(int8_t place, const char* name, const char* key) {
  return {name, key, List::Role::operand, place};
}
constexpr List scalar(int8_t place, const char* name, const char* key) {
  return {name, key, List::Role::scalar, place};
}
constexpr List partial(const char* name, const char* key) { return {name, key, List::Role::partial, 0}; }
constexpr List steps() { return {"state_steps", "step", List::Role::steps, 0}; }

// One hyper-parameter: the op's argument, what it is called in an optimizer's options (`key`, or the entry `index` of
// the tuple there) and where the rule keeps it. A flag may have no place in the rule.
template <class Rule>
struct Field {
  enum class Kind : uint8_t { number, tensor, flag, whole };
  const char* name;
  Kind kind;
  const char* key;
  int8_t index;  // -1: the option itself
  bool in_scalars = true;
  double Rule::* number = nullptr;
  bool Rule::* flag = nullptr;
  int64_t Rule::* whole = nullptr;
};

template <class Rule>
constexpr Field<Rule> number(const char* name, double Rule::* slot) {
  return {.name = name, .kind = Field<Rule>::Kind::number, .key = name, .index = -1, .number = slot};
}
template <class Rule>
constexpr Field<Rule> number(const char* name, double Rule::* slot, const char* key, int8_t index) {
  return {.name = name, .kind = Field<Rule>::Kind::number, .key = key, .index = index, .number = slot};
}
template <class Rule>
constexpr Field<Rule> flag(const char* name, bool Rule::* slot) {
  return {.name = name, .kind = Field<Rule>::Kind::flag, .key = name, .index = -1, .flag = slot};
}
template <class Rule>
constexpr Field<Rule> whole(const char* name, int64_t Rule::* slot) {
  return {.name = name, .kind = Field<Rule>::Kind::whole, .key = name, .index = -1, .whole = slot};
}
// A number on which none of the numbers of a parameter's state depend.
template <class Rule>
constexpr Field<Rule> apart_from_state(Field<Rule> number) {
  number.in_scalars = false;
  return number;
}
// A number that may also be given as a tensor with one element. On a GPU it is not waited for, unless numbers of state
// on the host depend on it.
template <class Rule>
constexpr Field<Rule> tensor_or(Field<Rule> number) {
  number.kind = Field<Rule>::Kind::tensor;
  return number;
}

// What at_step makes of hyper-parameters, the first of which it is proportional to or made of. A step goes no further
// where it is nothing to compute with, unless the first one is infinite: then so is what the caller asked for.
template <class Rule>
struct Derived {
  const char* name;
  double Rule::* value;  // null: the number of state `scalar`, as it is after the step
  int8_t scalar;
  bool may_be_infinite;  // only NaN is refused
  bool is_strict;        // also where the first one is infinite
  double Rule::* from[4];
};
template <class Rule, class... From>
constexpr Derived<Rule> finite(const char* name, double Rule::* value, From... from) {
  return {name, value, -1, false, false, {from...}};
}
template <class Rule, class... From>
constexpr Derived<Rule> real(const char* name, double Rule::* value, From... from) {
  return {name, value, -1, true, false, {from...}};
}
template <class Rule, class... From>
constexpr Derived<Rule> finite_scalar(const char* name, int8_t scalar, double Rule::* first, From... from) {
  return {name, nullptr, scalar, false, false, {first, from...}};
}
template <class Rule>
constexpr Derived<Rule> strictly(Derived<Rule> derived) {
  derived.is_strict = true;
  return derived;
}

}  // namespace optim_ext::rules
