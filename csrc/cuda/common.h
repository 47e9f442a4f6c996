// Host side of the CUDA ops: device, stream, launch. The emulator has its own file of this name.
#pragma once

#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/device.h"
#include "cuda/tiles.h"
#include "ops.h"

namespace fastcls::cuda {

// What a launch depends on besides the shape. Asking the driver takes microseconds, so it is asked
// once per device.
struct DeviceLimits {
  int arch;  // of the code in this library that the device runs: 90 for compute capability 9.0
  int multiprocessors;
  int max_shared_bytes;  // per block
  unsigned* counters;    // kCounters zeros in its memory
};

constexpr unsigned kCounters = 1 << 14;

const DeviceLimits& device_limits(int device);

// One of the device's counters that no launch on another stream uses, or null where there is none
// left. A stream has one for all its launches, which follow each other; a launch that is being
// captured has its own for ever, as nobody knows the streams on which graphs will run.
unsigned* counter_of(const DeviceLimits& limits, cudaStream_t stream);

// Lets launches of `kernel` on the current device, whose limits these are, have all the shared
// memory of a block. Not what one launch needs: the attribute is the kernel's, and another thread
// may be about to launch it with more.
void allow_shared(const void* kernel, const DeviceLimits& limits);

// Launches kernels on the device of `t`, which is the current one as long as this lives, and on
// PyTorch's current stream there:
//
//   const Launcher launch(input);
//   launch(some_kernel<float>, grid, threads, pointer, size);
class Launcher {
 public:
  explicit Launcher(const Tensor& t)
      : guard_(t.get_device_index()), limits_(device_limits(t.get_device_index())) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Params, typename... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, int threads, const Args&... args) const {
    with_shared(0, kernel, grid, threads, args...);
  }

  // With `shared_bytes` of shared memory for DYNAMIC_SHARED, at most max_shared_bytes().
  template <typename... Params, typename... Args>
  void with_shared(int64_t shared_bytes, void (*kernel)(Params...), dim3 grid, int threads,
                   const Args&... args) const {
    if (shared_bytes > kSharedWithoutAsking)
      allow_shared(reinterpret_cast<const void*>(kernel), limits_);
    kernel<<<grid, threads, shared_bytes, stream_>>>(args...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // For blocks that agree on which of them is the last one. It is 0 before the launch, and the
  // kernel has to leave it so. Null where there is none: then another launch has to do the work.
  unsigned* counter() const { return counter_of(limits_, stream_); }

  int arch() const { return limits_.arch; }
  int multiprocessors() const { return limits_.multiprocessors; }
  int64_t max_shared_bytes() const { return limits_.max_shared_bytes; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  const DeviceLimits& limits_;
  cudaStream_t stream_;
};

}  // namespace fastcls::cuda
