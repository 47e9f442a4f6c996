// The fast cross-entropy kernels as the host code sees them: one table per instruction set.
#pragma once

#include <cstdint>

#include "cpu/cross_entropy_general.h"

namespace fastcls::cpu {

// cross_entropy_row_loops.h
struct RowLoops {
  bool (*all_in_range)(const int64_t* y, int64_t n, int64_t C);
  int64_t (*copy_classes)(const int64_t* classes, int64_t n, int64_t C, int64_t ignore_index,
                          int64_t* y);
  double (*sum)(const float* values, int64_t n);
};

// Same meaning as forward_general and backward_general. `loss` and `scale` of a run are accessed in
// whole vectors: they have kPadding numbers more.
template <typename T, typename P, typename Acc>
struct RowKernels {
  void (*forward)(const RowRun<T, P, Acc>& run);
  void (*backward)(const RowRun<T, P, Acc>& run);
};

// Of logits of dtype T.
template <typename T>
struct CrossEntropyKernels {
  RowKernels<T, T, float> own;       // classes, or probabilities of dtype T
  RowKernels<T, float, float> wide;  // float probabilities
  RowLoops loops;
};

constexpr int kPadding = 16;  // a vector of AVX-512, the longest

template <typename T, typename P, typename Acc>
bool classes_are_adjacent(const RowRun<T, P, Acc>& run) {
  return run.x_class == 1 && (!run.prob || run.t_class == 1) && (!run.grad || run.grad_class == 1);
}

// Strided classes go through a copy, whose numbers take 64 or 128 bytes a class for each thread.
constexpr int64_t kMostStridedClasses = 1 << 18;

template <typename T, typename P, typename Acc>
bool fast_path_serves(const RowRun<T, P, Acc>& run) {
  return run.C > 0 && (classes_are_adjacent(run) || run.C <= kMostStridedClasses);
}

namespace avx2 {
template <typename T>
CrossEntropyKernels<T> cross_entropy_kernels();
}  // namespace avx2
namespace avx512 {
template <typename T>
CrossEntropyKernels<T> cross_entropy_kernels();
}  // namespace avx512
namespace avx512_bf16 {  // of bfloat16 alone
template <typename T>
CrossEntropyKernels<T> cross_entropy_kernels();
}  // namespace avx512_bf16

}  // namespace fastcls::cpu
