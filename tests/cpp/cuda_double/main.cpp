// Usage: test_cuda_double GROUP [FAULT [races]]: sweeps, kept, reductions, fibers, history or order; or "misuse NAME",
// which the double has to refuse.
#include <cstdlib>
#include <cstring>

#include "place.h"

int optim_ext::planted_fault = 0;
bool optim_ext::all_races = false;

// One race says enough.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "halt_on_error=1"; }

int main(int count, char** words) {
  using namespace optim_ext;
  const char* const group = count > 1 ? words[1] : "";
  const auto is = [&](const char* name) { return std::strcmp(group, name) == 0; };
  if (is("misuse") && count > 2) {
    test_misuse(words[2]);
    return 1;
  }
  if (count > 2) planted_fault = std::atoi(words[2]);
  all_races = count > 3 && std::strcmp(words[3], "races") == 0;
  if (is("sweeps")) {
    test_sweeps();
  } else if (is("kept")) {
    test_kept();
  } else if (is("reductions")) {
    test_reductions();
  } else if (is("fibers")) {
    test_fibers();
  } else if (is("history")) {
    test_history();
  } else if (is("order")) {
    test_order();
  } else {
    std::fprintf(stderr, "there is no group of cases '%s'\n", group);
    return 2;
  }
  return verdict();
}
