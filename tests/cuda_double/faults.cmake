# The test of the tests: the module once more, with faults in what brings kernels to torch's streams and memory. Which is
# in says the environment (OPTIM_EXT_FAULT, by name); test_faults.py has the test that has to fail for each.
include(${core}/plant.cmake)
set(planted_tree ${CMAKE_BINARY_DIR}/planted/csrc)
set(planted_code ops/driver_cuda.cpp device/cuda/device.cu)
file(GLOB_RECURSE headers RELATIVE ${csrc} CONFIGURE_DEPENDS ${csrc}/*.h)
read_sources(${headers} ${planted_code})

set(names)
macro(fault name file old new)
  plant_fault(${file} "${old}" "${new}")
  string(APPEND names "  if (name == \"${name}\") return ${fault_count};\n")
endmacro()

fault(no_record_event ops/driver_cuda.cpp
[[  at::getHostAllocator(at::kCUDA)->record_event(]]
[[  if (!FAULT) at::getHostAllocator(at::kCUDA)->record_event(]])
fault(default_stream ops/driver_cuda.cpp
[[    : stream(c10::cuda::getCurrentCUDAStream(device.index())),]]
[[    : stream(FAULT ? c10::cuda::getDefaultCUDAStream(device.index()) : c10::cuda::getCurrentCUDAStream(device.index())),]])
fault(capture_not_seen ops/driver_cuda.cpp
[[  check(device::capturing(stream, capturing));]]
[[  check(device::capturing(stream, capturing));
  if (FAULT) capturing = false;]])
fault(device_not_chosen ops/driver_cuda.cpp
[[void CudaDriver::history_combine(at::Device device, const HistoryCombination& task, Norms* out) {
  const c10::DeviceGuard guard(device);]]
[[void CudaDriver::history_combine(at::Device device, const HistoryCombination& task, Norms* out) {
  const c10::OptionalDeviceGuard guard(FAULT ? std::nullopt : std::optional(device));]])
fault(table_on_the_default_stream device/cuda/device.cu
[[cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream)]]
[[cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, FAULT ? nullptr : stream)]])
fault(table_too_short device/cuda/device.cu
[[cudaMemcpyAsync(to, from, static_cast<size_t>(bytes),]]
[[cudaMemcpyAsync(to, from, static_cast<size_t>(bytes) - (FAULT ? 8 : 0),]])
fault(waiting_upload device/cuda/device.cu
[[Status upload(void* to, const void* from, int64_t bytes, Stream stream) {]]
[[Status upload(void* to, const void* from, int64_t bytes, Stream stream) {
  if (FAULT) cudaStreamSynchronize(stream);]])
fault(counter_not_cleared device/cuda/device.cu
[[return cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream);]]
[[return FAULT ? cudaSuccess : cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream);]])

write_planted(${planted_tree})
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/planted/planted.h @ONLY CONTENT [[
#pragma once
#include <cstdlib>
#include <optional>
#include <string>
inline int planted_number() {
  const char* const given = std::getenv("OPTIM_EXT_FAULT");
  const std::string name = given ? given : "";
  if (name.empty()) return 0;
@names@  std::abort();
}
inline bool planted(int fault) {
  static const int number = planted_number();
  return fault == number;
}
]])
list(TRANSFORM planted_code PREPEND ${planted_tree}/)
set_source_files_properties(${planted_tree}/device/cuda/device.cu PROPERTIES LANGUAGE CXX COMPILE_OPTIONS -xc++)
add_library(planted_objects OBJECT ${planted_code})
for_the_module(planted_objects)
target_compile_options(planted_objects PRIVATE -include ${CMAKE_BINARY_DIR}/planted/planted.h)
add_module(planted_module ${CMAKE_BINARY_DIR}/planted/run
           $<TARGET_OBJECTS:planted_objects> $<FILTER:$<TARGET_OBJECTS:host_objects>,EXCLUDE,/driver_cuda\\.cpp\\.o$>
           $<FILTER:$<TARGET_OBJECTS:device_objects>,EXCLUDE,/device\\.cu\\.o$>)
