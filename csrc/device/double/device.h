// The verbs on the double: each thread of a grid runs on a fiber of the calling thread, in an order that follows from a
// seed. Misuse that hardware would meet with a hang or with wrong numbers ends the process with a message. Where it is
// built with -fsanitize=thread, two accesses that nothing orders are reported as a data race.
//
// Without torch a launch runs at once. Beside torch (OPTIM_EXT_WITH_CUDA) it goes along a stream of the double of the
// CUDA runtime, and the other verbs are the GPU's own.
#pragma once

#include <memory>
#include <tuple>
#include <utility>

#if defined(OPTIM_EXT_WITH_CUDA)
#include "../cuda/verbs.h"
#else
#include "at_once.h"
#endif

namespace optim_ext::device {

// A grid, and what each of its threads does: invoke(arguments).
struct Launch {
  const char* kernel;
  Grid grid;
  int threads;
  void (*invoke)(const void*);
  std::shared_ptr<const void> arguments;
  int64_t argument_bytes;
};

// Gives a launch to a stream.
Status queue(const Launch& launch, Stream stream);

// Where arguments lie beside each other, each aligned as it asks for.
template <class... Parameters>
constexpr int64_t bytes_of_arguments() {
  int64_t bytes = 0;
  ((bytes = (bytes + static_cast<int64_t>(alignof(Parameters)) - 1) / static_cast<int64_t>(alignof(Parameters)) *
                static_cast<int64_t>(alignof(Parameters)) +
            static_cast<int64_t>(sizeof(Parameters))),
   ...);
  return bytes;
}

template <class... Parameters>
Status launch(void (*kernel)(Parameters...), const Grid& grid, int threads, Stream stream,
              const std::type_identity_t<std::remove_cvref_t<Parameters>>&... arguments) {
  // A copy, as a launch makes one: the caller's may change before a stream gets there.
  struct Work {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cvref_t<Parameters>...> arguments;
  };
  const auto invoke = [](const void* of) {
    const Work& given = *static_cast<const Work*>(of);
    std::apply(given.kernel, given.arguments);
  };
  return queue(
      {__PRETTY_FUNCTION__, grid, threads, invoke, std::shared_ptr<const Work>(new Work{kernel, {arguments...}}),
       bytes_of_arguments<std::remove_cvref_t<Parameters>...>()},
      stream);
}

}  // namespace optim_ext::device
