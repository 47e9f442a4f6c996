// Sizes and strides of a cross-entropy, as plain integers, shared by CPU and CUDA.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTCLS_HOST_DEVICE __host__ __device__
#else
#define FASTCLS_HOST_DEVICE
#endif

namespace fastcls {

// The values that PyTorch's own ops use.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// What the forward op saves for the backward pass: nothing; two numbers per row and the divisor of
// the mean, from which cross_entropy_backward reads the logits again; or the gradient of the logits
// itself, from the same pass, for a gradient of the result of 1.
enum Save : int64_t { kSaveNothing = 0, kSaveRows = 1, kSaveGrad = 2 };

// The tensors that are walked row by row. A row is one softmax: the C logits of one sample, or of
// one position of one sample. Class-index targets, losses and saved values are flat over rows.
enum RowOperand { kInput = 0, kTarget = 1, kGrad = 2, kRowOperands = 3 };

constexpr int kMaxRowDims = 8;

// input [N, C, d1, d2, …] without its class dimension: rows over (N, d1, d2, …), with neighbouring
// dimensions merged wherever every operand's strides allow it. Strides count elements.
struct RowLayout {
  int64_t rows = 1, C = 0;
  int dims = 0;
  int64_t size[kMaxRowDims] = {};
  int64_t stride[kRowOperands][kMaxRowDims] = {};
  int64_t class_stride[kRowOperands] = {};

  FASTCLS_HOST_DEVICE int64_t offset(RowOperand operand, int64_t row) const {
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      offset += (row % size[d]) * stride[operand][d];
      row /= size[d];
    }
    return offset;
  }

  // Rows within a run of `run()` lie at equal distances row_stride(operand).
  int64_t run() const { return dims == 0 ? 1 : size[dims - 1]; }
  FASTCLS_HOST_DEVICE int64_t row_stride(RowOperand operand) const {
    return dims == 0 ? 0 : stride[operand][dims - 1];
  }
};

}  // namespace fastcls
