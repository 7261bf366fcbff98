// The double of the CUDA runtime: a library that is loaded before the real one (LD_PRELOAD) and takes its calls. Two
// devices of 6 GB each are made of host memory; work goes along streams and is run by the thread that waits for it, or
// at once. This header is what its parts, and the rerouting of torch's ops, have of each other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

namespace cuda_double {

constexpr int kDevices = 2;

// From the environment: CUDA_DOUBLE, words with commas between them, and CUDA_DOUBLE_SEED.
struct Settings {
  bool lazy = false;    // work waits until somebody waits for it, or now and then runs a little
  bool guard = false;   // allocations end where memory ends, to the last 16 bytes
  bool closed = false;  // memory of a device can be touched by its work only
  uint64_t seed = 1;    // of the order of threads, and of what runs when
};
const Settings& settings();

// Whoever is in the double is there alone. Work runs inside, and needs neither Python's lock nor another thread.
class Entered {
 public:
  Entered();

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

// The calling thread's, as cudaSetDevice left it.
int current_device();

// Remembers the error for cudaGetLastError.
cudaError_t fail(cudaError_t error);

// ---- streams ----

enum class Kind { kernel, copy, memset, host, graph, runtime };

// Gives work to a stream, or to the graph it captures. `devices` has a bit for each whose memory the work may touch; 0:
// the stream's own.
void enqueue(cudaStream_t stream, Kind kind, const std::string& name, std::function<void()> work, unsigned devices = 0);

bool capturing(cudaStream_t stream);
int device_of(cudaStream_t stream);

// Returns when the stream, or every stream, has nothing left to do.
void finish(cudaStream_t stream);
void finish_all();

// True, and spoils every capture under way, where the calling thread must not make such a call while a stream captures.
bool spoils_a_capture();

// Tells whoever traces what was asked of the double.
void note(Kind kind, const std::string& name);

// ---- memory ----

// As long as this lives, the memory of the devices in `devices` may be touched, be it closed at other times.
class Opened {
 public:
  explicit Opened(unsigned devices);
  ~Opened();
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

 private:
  const Entered entered_;
  const unsigned devices_;
};

// The device whose memory this is; -1: of the host, pinned; -2: not of the double.
int place_of(const void* pointer);

}  // namespace cuda_double
