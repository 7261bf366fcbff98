// Memory of the devices and pinned memory of the host: mapped from the system, full of NaN, between pages that nobody
// may touch. What is freed stays away for a while, so that whoever still uses it is told.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <vector>

#include "core.h"
#include "runtime.h"

namespace cuda_double {
namespace {

constexpr size_t kPage = 4096, kLargePage = 2 << 20, kDeviceBytes = size_t{6} << 30;
constexpr size_t kFilled = size_t{64} << 20;  // larger ones start as zeros: filling them would make them real
constexpr size_t kRemembered = 4096;          // freed allocations
constexpr int kHost = -1, kNowhere = -2;

struct Allocation {
  char* begin = nullptr;
  size_t bytes = 0;
  char* map = nullptr;
  size_t map_bytes = 0;
  int device = kHost;
  bool freed = false;

  char* body() const { return map + kPage; }
  size_t body_bytes() const { return map_bytes - 2 * kPage; }
};

std::map<const char*, Allocation>& allocations() {
  static auto& all = *new std::map<const char*, Allocation>;
  return all;
}
std::deque<const char*> freed;
size_t used[kDevices] = {};
int opened[kDevices] = {};  // how many are at work on it

Allocation* around(const void* pointer) {
  const auto* const at = static_cast<const char*>(pointer);
  auto next = allocations().upper_bound(at);
  for (int tries = 0; tries < 2; ++tries) {  // the one before it, or, for a page in front, the one after
    if (tries == 0 && next == allocations().begin()) continue;
    const auto candidate = tries == 0 ? std::prev(next) : next;
    if (candidate == allocations().end()) break;
    Allocation& found = candidate->second;
    if (at >= found.map && at < found.map + found.map_bytes) return &found;
  }
  return nullptr;
}

Allocation* holding(const void* pointer) {
  Allocation* const found = around(pointer);
  const auto* const at = static_cast<const char*>(pointer);
  return found && !found->freed && at >= found->begin && at < found->begin + std::max<size_t>(found->bytes, 1)
             ? found
             : nullptr;
}

void protect(const Allocation& of) {
  const bool open = !of.freed && (of.device == kHost || !settings().closed || opened[of.device] > 0);
  mprotect(of.body(), of.body_bytes(), open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void protect_all_of(int device) {
  if (!settings().closed) return;
  for (const auto& [begin, allocation] : allocations()) {
    if (allocation.device == device && !allocation.freed) protect(allocation);
  }
}

void say(const char* text) {
  if (write(2, text, std::strlen(text)) < 0) return;
}

// Whose memory this address is of, and why it must not be touched.
void describe(const Allocation& of, const char* at, char (&text)[400]) {
  char owner[40] = "pinned memory of the host";
  if (of.device >= 0) std::snprintf(owner, sizeof owner, "memory of device %d", of.device);
  const char* what = "is touched by the host, or by work of another device";
  if (of.freed) {
    what = "is touched after it was freed";
  } else if (at < of.begin) {
    what = "is touched before its beginning";
  } else if (at >= of.begin + of.bytes) {
    what = "is touched beyond its end";
  }
  std::snprintf(text, sizeof text, "%s %s (%zu bytes, at byte %td)", owner, what, of.bytes, at - of.begin);
}

// The runtime's own calls are told at once.
void refuse_freed(const void* pointer) {
  const Allocation* const found = around(pointer);
  if (!found || !found->freed) return;
  char text[400];
  describe(*found, static_cast<const char*>(pointer), text);
  optim_ext::device::refuse("%s", text);
}

// Says whose memory was touched and why that is wrong. Where it is not the double's, whatever would have happened does.
void on_bad_access(int signal, siginfo_t* info, void*) {
  if (info->si_code <= 0) return;  // sent by another handler; the access is about to be tried again
  const auto* const at = static_cast<const char*>(info->si_addr);
  const Allocation* const found = around(at);
  if (found) {
    char text[400];
    describe(*found, at, text);
    say("the double refuses: ");
    say(text);
    say("\n");
  }
  ::signal(signal, SIG_DFL);  // and the access is tried once more
}

__attribute__((constructor)) void listen() {
  struct sigaction action = {};
  action.sa_sigaction = &on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
}

void forget_the_oldest() {
  const auto oldest = allocations().find(freed.front());
  munmap(oldest->second.map, oldest->second.map_bytes);
  allocations().erase(oldest);
  freed.pop_front();
}

// A mapping that nobody may touch, with a page before and behind its body. A large one's body is made of large pages,
// if the system has some: to open and close it is a hundred times as quick.
char* reserve(size_t body) {
  const bool large = body >= kLargePage;
  const size_t wanted = body + 2 * kPage + (large ? kLargePage : 0);
  void* const found = mmap(nullptr, wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED || !large) return found == MAP_FAILED ? nullptr : static_cast<char*>(found);
  char* const begin = static_cast<char*>(found);
  const size_t past = (reinterpret_cast<uintptr_t>(begin) + kPage) % kLargePage;
  const size_t skipped = past == 0 ? 0 : kLargePage - past;
  if (skipped > 0) munmap(begin, skipped);
  if (skipped < kLargePage) munmap(begin + skipped + body + 2 * kPage, kLargePage - skipped);
  madvise(begin + skipped + kPage, body, MADV_HUGEPAGE);
  return begin + skipped;
}

void* take(size_t bytes, int device) {
  if (device >= 0 && used[device] + bytes > kDeviceBytes) return nullptr;
  const size_t body = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  Allocation made;
  made.bytes = bytes;
  made.device = device;
  made.map_bytes = body + 2 * kPage;
  made.map = reserve(body);
  if (!made.map) return nullptr;
  made.begin = made.body() + (settings().guard ? body - (bytes + 15) / 16 * 16 : 0);
  allocations()[made.begin] = made;
  if (device >= 0) used[device] += bytes;
  const Opened open(device >= 0 ? 1u << device : 0);
  protect(made);
  if (body <= kFilled) std::memset(made.body(), 0xff, body);
  return made.begin;
}

cudaError_t give_back(void* pointer) {
  if (!pointer) return cudaSuccess;
  Allocation* const found = holding(pointer);
  if (!found || found->begin != pointer) return fail(cudaErrorInvalidValue);
  if (found->device >= 0) used[found->device] -= found->bytes;
  found->freed = true;
  protect(*found);
  madvise(found->body(), found->body_bytes(), MADV_DONTNEED);
  freed.push_back(found->begin);
  if (freed.size() > kRemembered) forget_the_oldest();
  return cudaSuccess;
}

cudaError_t allocate(void** pointer, size_t bytes, int device, const char* call) {
  const Entered entered;
  note(Kind::runtime, call);
  if (spoils_a_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  *pointer = bytes == 0 ? nullptr : take(bytes, device);
  return *pointer || bytes == 0 ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

cudaError_t release(void* pointer, const char* call) {
  const Entered entered;
  note(Kind::runtime, call);
  if (pointer && spoils_a_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  finish_all();
  return give_back(pointer);
}

unsigned bit_of(const Allocation* allocation) {
  return allocation && allocation->device >= 0 ? 1u << allocation->device : 0u;
}

const char* direction(const Allocation* to, const Allocation* from) {
  return bit_of(to) ? (bit_of(from) ? "DtoD" : "HtoD") : bit_of(from) ? "DtoH" : "HtoH";
}

// As the runtime has it: from memory that is not pinned a copy is taken before the call returns, and to such memory the
// call returns when the copy is done.
cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool waits) {
  const Entered entered;
  const Allocation *const target = holding(to), *const source = holding(from);
  if (bytes == 0) return cudaSuccess;
  refuse_freed(to);
  refuse_freed(from);
  if ((kind == cudaMemcpyHostToDevice && !bit_of(target)) || (kind == cudaMemcpyDeviceToHost && !bit_of(source)) ||
      (kind == cudaMemcpyDeviceToDevice && (!bit_of(target) || !bit_of(source)))) {
    return fail(cudaErrorInvalidValue);
  }
  if (waits && spoils_a_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  if ((!target || !source) && capturing(stream)) return fail(cudaErrorStreamCaptureUnsupported);
  std::shared_ptr<std::vector<char>> staged;
  if (!source)
    staged =
        std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  enqueue(
      stream, Kind::copy, direction(target, source), [=] { std::memcpy(to, staged ? staged->data() : from, bytes); },
      bit_of(target) | bit_of(source));
  if (waits || !target) finish(stream);
  return cudaSuccess;
}

}  // namespace

Opened::Opened(unsigned devices) : devices_(devices) {
  for (int device = 0; device < kDevices; ++device) {
    if ((devices_ >> device & 1u) && opened[device]++ == 0) protect_all_of(device);
  }
}

Opened::~Opened() {
  for (int device = 0; device < kDevices; ++device) {
    if ((devices_ >> device & 1u) && --opened[device] == 0) protect_all_of(device);
  }
}

int place_of(const void* pointer) {
  const Entered entered;
  const Allocation* const found = holding(pointer);
  return found ? found->device : kNowhere;
}

}  // namespace cuda_double

using namespace cuda_double;

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, current_device(), __func__); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, kHost, __func__); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes, kHost, __func__); }
cudaError_t cudaFree(void* pointer) { return release(pointer, __func__); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer, __func__); }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Entered entered;
  *total = kDeviceBytes;
  *free = kDeviceBytes - used[current_device()];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const int place = place_of(pointer);
  *attributes = {};
  attributes->type = place == kNowhere ? cudaMemoryTypeUnregistered
                     : place == kHost  ? cudaMemoryTypeHost
                                       : cudaMemoryTypeDevice;
  attributes->device = place >= 0 ? place : place == kHost ? 0 : -2;
  attributes->devicePointer = place == kNowhere ? nullptr : const_cast<void*>(pointer);
  attributes->hostPointer = place >= 0 ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy(to, from, bytes, kind, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes, kind, stream, false);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream, false);
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  const Entered entered;
  if (bytes == 0) return cudaSuccess;
  refuse_freed(memory);
  const int place = place_of(memory);
  if (place < 0) return fail(cudaErrorInvalidValue);
  enqueue(stream, Kind::memset, "memset", [=] { std::memset(memory, value, bytes); }, 1u << place);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return cudaMemsetAsync(memory, value, bytes, nullptr); }

}  // extern "C"
