// The names of all rules, as C++ spells them: tests ask for these.
#pragma once

#include <span>

namespace optim_ext {

std::span<const char* const> rule_names();

}  // namespace optim_ext
