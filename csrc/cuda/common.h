// Host side of the CUDA ops: device, stream, launch. The emulator has its own file of this name.
#pragma once

#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/device.h"
#include "ops.h"

namespace fastcls::cuda {

// Launches kernels on the device of `t`, which is the current one as long as this lives, and on
// PyTorch's current stream there:
//
//   const Launcher launch(input);
//   launch(some_kernel<float>, grid, threads, pointer, size);
class Launcher {
 public:
  explicit Launcher(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Params, typename... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, int threads, const Args&... args) const {
    kernel<<<grid, threads, 0, stream_>>>(args...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastcls::cuda
