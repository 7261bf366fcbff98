// Streams, events and graphs: lists of work. The calls of the runtime with which they are made, waited for and
// captured.
#include "core.h"
#include "runtime.h"

#include <deque>
#include <memory>
#include <random>
#include <set>
#include <vector>

namespace cuda_double {
namespace {

struct Work {
  std::function<void()> run;
  unsigned devices = 0;
};

// What a stream does next: some work, or to wait until another stream has come as far as that.
struct Item {
  Work work;
  CUstream_st* other = nullptr;
  uint64_t count = 0;
};

}  // namespace
}  // namespace cuda_double

using cuda_double::Entered;
using cuda_double::Item;
using cuda_double::Kind;
using cuda_double::Work;

struct CUgraph_st {
  std::vector<Work> work;
};

struct CUgraphExec_st {
  std::vector<Work> work;
};

struct CUstream_st {
  int device = 0;
  unsigned flags = 0;
  int priority = 0;
  std::deque<Item> items;
  uint64_t queued = 0, done = 0;
  bool destroyed = false;
  // While it captures:
  std::shared_ptr<CUgraph_st> graph;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  unsigned long long capture = 0;
  bool begun_here = false, spoilt = false;
};

struct CUevent_st {
  int device = 0;
  CUstream_st* stream = nullptr;
  uint64_t count = 0;
  std::shared_ptr<CUgraph_st> graph;  // recorded while that was captured
};

namespace cuda_double {
namespace {

CUstream_st default_streams[kDevices];
std::set<CUstream_st*>& streams() {
  static auto& all = *[] {
    auto* made = new std::set<CUstream_st*>;
    for (int device = 0; device < kDevices; ++device) {
      default_streams[device].device = device;
      made->insert(&default_streams[device]);
    }
    return made;
  }();
  return all;
}

thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;
unsigned long long captures = 0;
int streams_that_capture = 0;

CUstream_st* stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) {
    streams();
    return &default_streams[current_device()];
  }
  if (!streams().count(handle))
    optim_ext::device::refuse("a stream that nobody has made: %p", static_cast<void*>(handle));
  if (handle->destroyed) optim_ext::device::refuse("a stream that was destroyed: %p", static_cast<void*>(handle));
  return handle;
}

void run_until(CUstream_st* stream, uint64_t count);

void run_one(CUstream_st* stream) {
  Item item = std::move(stream->items.front());
  stream->items.pop_front();
  // Done as well is what ends with an exception, as operations of torch do that refuse their arguments.
  struct Done {
    ~Done() { ++stream->done; }
    CUstream_st* const stream;
  } const done{stream};
  if (item.other) run_until(item.other, item.count);
  if (item.work.run) {
    const Opened opened(item.work.devices);
    item.work.run();
  }
}

void run_until(CUstream_st* stream, uint64_t count) {
  while (stream->done < count) run_one(stream);
}

// What the device may have done in the meantime: all there is, or, if it is lazy, a little at times.
void let_time_pass() {
  if (!settings().lazy) return finish_all();
  static std::mt19937_64 random(settings().seed);
  while (random() % 16 == 0) {
    auto stream = streams().begin();
    std::advance(stream, static_cast<long>(random() % streams().size()));
    if (!(*stream)->items.empty()) run_one(*stream);
  }
}

void add(CUstream_st* stream, Item item) {
  stream->items.push_back(std::move(item));
  ++stream->queued;
  let_time_pass();
}

cudaError_t spoil(CUstream_st* stream, cudaError_t error = cudaErrorStreamCaptureUnsupported) {
  stream->spoilt = true;
  return fail(error);
}

}  // namespace

void enqueue(cudaStream_t handle, Kind kind, const std::string& name, std::function<void()> run, unsigned devices) {
  const Entered entered;
  CUstream_st* const stream = stream_of(handle);
  if (kind == Kind::kernel && stream->device != current_device()) {
    optim_ext::device::refuse("a launch on a stream of device %d while device %d is current: %s", stream->device,
                              current_device(), name.c_str());
  }
  note(kind, name);
  Work work{std::move(run), devices ? devices : 1u << stream->device};
  if (stream->graph) {
    stream->graph->work.push_back(std::move(work));
  } else {
    add(stream, {std::move(work)});
  }
}

bool capturing(cudaStream_t stream) {
  const Entered entered;
  return stream_of(stream)->graph != nullptr;
}

int device_of(cudaStream_t stream) {
  const Entered entered;
  return stream_of(stream)->device;
}

void finish(cudaStream_t handle) {
  const Entered entered;
  CUstream_st* const stream = stream_of(handle);
  run_until(stream, stream->queued);
}

void finish_all() {
  const Entered entered;
  for (CUstream_st* stream : streams()) run_until(stream, stream->queued);
}

bool spoils_a_capture() {
  if (streams_that_capture == 0 || mode_of_thread == cudaStreamCaptureModeRelaxed) return false;
  bool any = false;
  for (CUstream_st* stream : streams()) {
    if (stream->graph && stream->mode != cudaStreamCaptureModeRelaxed) stream->spoilt = any = true;
  }
  return any;
}

}  // namespace cuda_double

using namespace cuda_double;

extern "C" {

// ---- streams ----

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  const Entered entered;
  auto* const made = new CUstream_st;
  made->device = current_device();
  made->flags = flags;
  made->priority = priority;
  streams().insert(made);
  *stream = made;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Entered entered;
  finish(stream);
  stream->destroyed = true;  // kept, so that it is known when somebody uses it
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  const Entered entered;
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  const Entered entered;
  *flags = stream_of(stream)->flags;
  return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  *device = device_of(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Entered entered;
  CUstream_st* const stream = stream_of(handle);
  if (stream->graph || spoils_a_capture()) return spoil(stream);
  let_time_pass();
  return stream->done == stream->queued ? cudaSuccess : fail(cudaErrorNotReady);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Entered entered;
  note(Kind::runtime, __func__);
  CUstream_st* const stream = stream_of(handle);
  if (stream->graph || spoils_a_capture()) return spoil(stream);
  finish(handle);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const Entered entered;
  CUstream_st* const stream = stream_of(handle);
  if (event->graph) {
    if (event->stream->graph != event->graph) return fail(cudaErrorCapturedEvent);  // that capture is over
    if (stream->graph && stream->graph != event->graph) return spoil(stream, cudaErrorStreamCaptureMerge);
    if (!stream->graph) {  // it joins the capture
      stream->graph = event->graph;
      stream->mode = event->stream->mode;
      stream->capture = event->stream->capture;
      ++streams_that_capture;
    }
    return cudaSuccess;
  }
  if (!event->stream) return cudaSuccess;
  if (stream->graph) return spoil(stream, cudaErrorStreamCaptureIsolation);
  add(stream, {{}, event->stream, event->count});
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Entered entered;
  note(Kind::runtime, __func__);
  if (spoils_a_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  finish_all();
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  enqueue(stream, Kind::host, "host function", [=] { function(data); });
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  enqueue(stream, Kind::host, "callback", [=] { function(stream, cudaSuccess, data); });
  return cudaSuccess;
}

// ---- events ----

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  (*event)->device = current_device();
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Entered entered;
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  const Entered entered;
  CUstream_st* const stream = stream_of(handle);
  if (event->device != stream->device) return fail(cudaErrorInvalidResourceHandle);
  event->stream = stream;
  event->graph = stream->graph;
  event->count = stream->queued;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Entered entered;
  if (event->graph || spoils_a_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  let_time_pass();
  return !event->stream || event->stream->done >= event->count ? cudaSuccess : fail(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Entered entered;
  note(Kind::runtime, __func__);
  if (event->graph || spoils_a_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  if (event->stream) run_until(event->stream, event->count);
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;  // there is no time here
  return cudaSuccess;
}

// ---- capture ----

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Entered entered;
  CUstream_st* const stream = stream_of(handle);
  if (handle == nullptr) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->graph) return fail(cudaErrorIllegalState);
  stream->graph = std::make_shared<CUgraph_st>();
  stream->mode = mode;
  stream->spoilt = false;
  stream->begun_here = true;
  stream->capture = ++captures;
  ++streams_that_capture;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Entered entered;
  CUstream_st* const stream = stream_of(handle);
  *graph = nullptr;
  if (!stream->graph || !stream->begun_here) return fail(cudaErrorIllegalState);
  const auto captured = stream->graph;
  bool spoilt = false;
  for (CUstream_st* other : streams()) {
    if (other->graph != captured) continue;
    spoilt |= other->spoilt;
    other->graph = nullptr;
    other->spoilt = other->begun_here = false;
    --streams_that_capture;
  }
  if (spoilt) return fail(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st(*captured);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Entered entered;
  const CUstream_st* const stream = stream_of(handle);
  *status = !stream->graph   ? cudaStreamCaptureStatusNone
            : stream->spoilt ? cudaStreamCaptureStatusInvalidated
                             : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  const Entered entered;
  const CUstream_st* const stream = stream_of(handle);
  if (id) *id = stream->capture;
  if (graph) *graph = stream->graph.get();
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(handle, status);
}

// ---- graphs ----

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = graph->work.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  *ready = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(ready, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream) {
  enqueue(stream, Kind::graph, "graph", [ready] {
    for (const Work& work : ready->work) {
      const Opened opened(work.devices);
      work.run();
    }
  });
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) {
  const Entered entered;
  finish_all();
  delete ready;
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = nullptr;
  return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

}  // extern "C"
