// What the host side asks the driver, once per device.
#include "cuda/common.h"

#include <map>
#include <mutex>

namespace fastcls::cuda {

namespace {

__global__ void any_kernel() {}

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
  return {code.ptxVersion, attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
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

}  // namespace fastcls::cuda
