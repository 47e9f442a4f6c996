// What the host side asks the driver, once per device.
#include "cuda/common.h"

#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace fastcls::cuda {

namespace {

__global__ void any_kernel() {}
__device__ unsigned counters[kCounters];

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

DeviceLimits ask(int device) {
  // The device may be newer than any code in this library: PTX compiled for 7.5 has no matrix
  // instructions on whatever device it runs.
  cudaFuncAttributes code{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(any_kernel)));
  void* zeros = nullptr;
  STD_CUDA_CHECK(cudaGetSymbolAddress(&zeros, counters));
  return {code.ptxVersion, attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          static_cast<unsigned*>(zeros)};
}

}  // namespace

// The device has to be the current one: code is loaded per device.
const DeviceLimits& device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;  // references stay valid
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask(device)).first->second;
}

void allow_shared(const void* kernel, const DeviceLimits& limits) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, const DeviceLimits*>> allowed;
  const std::lock_guard lock(mutex);
  if (allowed.count({kernel, &limits})) return;
  cudaFuncAttributes of_kernel{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&of_kernel, kernel));
  const int declared = static_cast<int>(of_kernel.sharedSizeBytes);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      limits.max_shared_bytes - declared));
  allowed.insert({kernel, &limits});
}

// One handle, cudaStreamPerThread, is many streams: it has none.
unsigned* counter_of(const DeviceLimits& limits, cudaStream_t stream) {
  if (stream == cudaStreamPerThread) return nullptr;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  static std::mutex mutex;
  static std::map<const unsigned*, unsigned> used;  // of each device's counters
  static std::map<std::pair<const unsigned*, cudaStream_t>, unsigned*> of_stream;
  const std::lock_guard lock(mutex);
  const bool captured = status != cudaStreamCaptureStatusNone;
  const auto found = of_stream.find({limits.counters, stream});
  if (!captured && found != of_stream.end()) return found->second;
  unsigned& count = used[limits.counters];
  if (count == kCounters) return nullptr;
  unsigned* const counter = limits.counters + count++;
  if (!captured) of_stream[{limits.counters, stream}] = counter;
  return counter;
}

}  // namespace fastcls::cuda
