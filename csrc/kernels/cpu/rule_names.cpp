#include "../rule_names.h"

#include "../../rules/all_rules.h"

namespace optim_ext {

std::span<const char* const> rule_names() {
#define OPTIM_EXT_NAME(...) #__VA_ARGS__,
  static constexpr const char* kNames[] = {OPTIM_EXT_FOR_EACH_RULE(OPTIM_EXT_NAME)};
#undef OPTIM_EXT_NAME
  return kNames;
}

}  // namespace optim_ext
