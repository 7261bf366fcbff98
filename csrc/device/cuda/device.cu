#include "../device.h"

namespace optim_ext::device {

Status zero(void* memory, int64_t bytes, Stream stream) {
  return cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream);
}

Status upload(void* to, const void* from, int64_t bytes, Stream stream) {
  return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream);
}

Status capturing(Stream stream, bool& answer) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const Status error = cudaStreamIsCapturing(stream, &status);
  answer = status != cudaStreamCaptureStatusNone;
  return error;
}

int multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0 ? count : 1;
}

bool takes_arguments() {
  static const bool takes = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return takes;
}

}  // namespace optim_ext::device
