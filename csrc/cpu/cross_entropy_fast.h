// The fast cross-entropy kernels as the host code sees them: one table per instruction set.
#pragma once

#include <cstdint>

#include "cpu/cross_entropy_general.h"

namespace fastcls::cpu {

// cross_entropy_row_loops.h
struct RowLoops {
  bool (*all_in_range)(const int64_t* y, int64_t n, int64_t C);
  double (*sum)(const float* values, int64_t n);
};

// Same meaning as forward_general and backward_general, for logits and probabilities of dtype T.
// `loss` and `scale` of a run are accessed in whole vectors: they have kPadding numbers more.
template <typename T>
struct CrossEntropyKernels {
  void (*forward)(const RowRun<T, T, float>& run);
  void (*backward)(const RowRun<T, T, float>& run);
  RowLoops loops;
};

constexpr int kPadding = 16;  // a vector of AVX-512, the longest

// Rows are put side by side, one to a lane, in a tile of C vectors on the stack. It stays within
// the first-level cache (16 KiB of AVX-512 vectors).
constexpr int64_t kMaxTileClasses = 256;

template <typename T, typename P, typename Acc>
bool classes_are_adjacent(const RowRun<T, P, Acc>& run) {
  return run.x_class == 1 && (!run.prob || run.t_class == 1) && (!run.grad || run.grad_class == 1);
}

template <typename T, typename P, typename Acc>
bool fast_path_serves(const RowRun<T, P, Acc>& run) {
  return run.C > 0 && (classes_are_adjacent(run) || run.C <= kMaxTileClasses);
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
