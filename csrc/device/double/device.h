// The verbs on the double: a launch runs at once, each thread of its grid on a fiber of the calling thread, in an order
// that follows from a seed. Misuse that hardware would meet with a hang or with wrong numbers ends the process with a
// message. Where it is built with -fsanitize=thread, two accesses that nothing orders are reported as a data race.
#pragma once

#include <tuple>
#include <utility>

namespace optim_ext::device {

enum class Status { success, invalid_grid };
constexpr Status kSuccess = Status::success, kInvalidGrid = Status::invalid_grid;

// Work runs in the order it is given, so there is one stream.
struct Queue;
using Stream = Queue*;

// Decides the order of blocks, of threads, and how many blocks are under way at a time.
void set_seed(uint64_t seed);

// Runs a grid: invoke(arguments) is what every thread does.
void run_grid(const char* kernel, const Grid& grid, int threads, void (*invoke)(const void*), const void* arguments,
              int64_t argument_bytes);

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
Status launch(void (*kernel)(Parameters...), const Grid& grid, int threads, Stream,
              const std::type_identity_t<std::remove_cvref_t<Parameters>>&... arguments) {
  // A copy, as a launch makes one: the caller's may change before a stream gets there.
  struct Work {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cvref_t<Parameters>...> arguments;
  };
  const Work work{kernel, {arguments...}};
  const auto invoke = [](const void* of) {
    const Work& given = *static_cast<const Work*>(of);
    std::apply(given.kernel, given.arguments);
  };
  run_grid(__PRETTY_FUNCTION__, grid, threads, invoke, &work, bytes_of_arguments<std::remove_cvref_t<Parameters>...>());
  return kSuccess;
}

Status zero(void* memory, int64_t bytes, Stream stream);
Status upload(void* to, const void* from, int64_t bytes, Stream stream);

inline Status capturing(Stream, bool& answer) {
  answer = false;
  return kSuccess;
}
inline int multiprocessors(int) { return 4; }
inline bool takes_arguments() { return true; }

}  // namespace optim_ext::device
