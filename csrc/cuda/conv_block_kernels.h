// What the files of the CUDA conv block share: winner codes, and their launchers.
#pragma once

#include "conv_block.h"
#include "cuda/common.h"
#include "cuda/tiles.h"

namespace fastcls::cuda {

// Winner codes [N, out_h, out_w, K] of either width, told apart here: a template argument would
// double the number of kernels. Null data: nothing is remembered, and every winner is the one
// position of its window.
struct Codes {
  static constexpr int kNone = -1;  // the ReLU is shut
  void* data;
  bool wide;

  __device__ int get(int64_t index) const {
    if (!data) return 0;
    return wide ? decoded(static_cast<const int32_t*>(data)[index])
                : decoded(static_cast<const uint8_t*>(data)[index]);
  }
  __device__ void set(int64_t index, int code) const {
    if (!data) return;
    if (wide)
      static_cast<int32_t*>(data)[index] = code == kNone ? kShut<int32_t> : code;
    else
      static_cast<uint8_t*>(data)[index] = code == kNone ? kShut<uint8_t> : code;
  }

 private:
  template <typename Win>
  __device__ static int decoded(Win code) {
    return code == kShut<Win> ? kNone : code;
  }
};

// Pooled positions [first, last] whose windows contain conv-map position `at`, along one axis.
template <typename Int>
struct Windows {
  Int first, last;
};

template <typename Int>
__device__ Windows<Int> windows_over(Int at, Int window, Int stride, Int pad, Int out) {
  const Int before = at + pad - window;  // a window that starts here ends just before `at`
  const Int last = (at + pad) / stride;
  return {before < 0 ? 0 : before / stride + 1, last < out ? last : out - 1};
}

// The operands of one call. A gradient that is not wanted is an empty tensor.
struct ForwardTensors {
  const Tensor &input, &weight;
  const std::optional<Tensor>& bias;  // contiguous
  const Tensor& out;
  Codes codes;
};

struct BackwardTensors {
  const Tensor &grad_out, &input, &weight;
  Codes codes;
  const Tensor &grad_input, &grad_weight, &grad_bias;
};

// The kernels of conv_block_general.cu serve every argument and dtype.
void launch_general_forward(const Launcher&, const ConvBlockShape&, const ForwardTensors&);
void launch_general_backward_input(const Launcher&, const ConvBlockShape&, const BackwardTensors&);
void launch_general_backward_weight(const Launcher&, const ConvBlockShape&, const BackwardTensors&);
// Adds up the chunks of `partial` [chunks, K, weight_grad_row] into dW and db.
void launch_sum_chunks(const Launcher&, const ConvBlockShape&, int64_t chunks,
                       const Tensor& partial, const BackwardTensors&);

// Those below serve what they have a plan for.
void launch_gemm_forward(const Launcher&, const ConvBlockShape&, const GemmPlan&, Arithmetic,
                         const ForwardTensors&);
// `s` is the block's own shape, the plan that of its transpose.
void launch_gemm_backward_input(const Launcher&, const ConvBlockShape& s, const GemmPlan&,
                                Arithmetic, const BackwardTensors&);
void launch_gemm_backward_weight(const Launcher&, const ConvBlockShape&, const WeightGradPlan&,
                                 Arithmetic, const BackwardTensors&);

}  // namespace fastcls::cuda
