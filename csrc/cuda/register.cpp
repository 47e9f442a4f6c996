// The CUDA kernels of the ops; schemas are in ops.cpp.
#include "ops.h"

#include <torch/csrc/stable/library.h>

// The host emulator registers this same list for CPU tensors, in a namespace of its own.
#ifndef FASTCLS_CUDA_NAMESPACE
#define FASTCLS_CUDA_NAMESPACE fastcls
#define FASTCLS_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTCLS_CUDA_NAMESPACE, FASTCLS_CUDA_KEY, m) {
  m.impl("conv_block_forward", TORCH_BOX(&fastcls::cuda::conv_block_forward));
  m.impl("conv_block_backward", TORCH_BOX(&fastcls::cuda::conv_block_backward));
  m.impl("conv_block_path", TORCH_BOX(&fastcls::cuda::conv_block_path));
  m.impl("cross_entropy_forward", TORCH_BOX(&fastcls::cuda::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastcls::cuda::cross_entropy_backward));
  m.impl("cross_entropy_scale_", TORCH_BOX(&fastcls::cuda::cross_entropy_scale));
}
