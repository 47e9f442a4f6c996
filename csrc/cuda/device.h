// What kernels use of a GPU. Kernels are plain CUDA C++ and keep to this list, so that the host
// emulator can run them: tests/emulator/cuda/device.h implements the same names for g++ and stands
// first on the emulator's include path.
//
//   threadIdx, blockIdx, blockDim, gridDim      __global__, __device__, __launch_bounds__
//   __syncthreads(), __syncwarp()               SHARED_ARRAY(type, name, count)
//   __shfl_sync, __shfl_down_sync, __shfl_xor_sync, __any_sync, __all_sync, __ballot_sync
//
// Warp functions are called by all 32 threads of a warp, with mask kFullWarp.
#pragma once

#include <cuda_runtime.h>

namespace fastcls::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace fastcls::cuda

// An array in the block's shared memory, uninitialised.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
