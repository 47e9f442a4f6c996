// cross_entropy of up to 32 neighbouring classes: a thread owns a row and holds it in registers.
//
// Threads next to each other read rows next to each other, in the largest pieces that every row is
// a multiple of: what one load leaves of a sector the next ones find in the first-level cache. No
// thread waits for another before the sum over rows, which is what counts where a launch takes
// longer than its memory traffic.
#pragma once

#include <cstring>

#include "cuda/cross_entropy_softmax.h"

namespace fastcls::cuda {

constexpr int kFewThreads = 128, kMostFewClasses = 32;

// Calls f(piece, index of the piece) for the pieces of a row of C elements.
template <typename Piece, typename T, int kMaxC, typename F>
__device__ void for_pieces(int C, const F& f) {
  constexpr int kPer = sizeof(Piece) / sizeof(T);
  if constexpr (kPer > 0) {
#pragma unroll
    for (int i = 0; i < kMaxC / kPer; ++i)
      if (i * kPer < C) f(i);
  }
}

// Calls f with a value of the type of `bytes` bytes.
template <typename F>
__device__ void dispatch_piece(int bytes, const F& f) {
  switch (bytes) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint16_t{});
  }
}

template <typename T, int kMaxC>
__device__ void load_row(const T* from, int C, int piece_bytes, float (&x)[kMaxC]) {
  dispatch_piece(piece_bytes, [&](auto type) {
    using Piece = decltype(type);
    for_pieces<Piece, T, kMaxC>(C, [&](int i) {
      constexpr int kPer = sizeof(Piece) < sizeof(T) ? 1 : sizeof(Piece) / sizeof(T);
      T elements[kPer];
      const Piece piece = reinterpret_cast<const Piece*>(from)[i];
      std::memcpy(elements, &piece, sizeof(Piece));
#pragma unroll
      for (int k = 0; k < kPer; ++k) x[i * kPer + k] = static_cast<float>(elements[k]);
    });
  });
}

template <typename T, int kMaxC>
__device__ void store_row(T* to, int C, int piece_bytes, const float (&x)[kMaxC]) {
  dispatch_piece(piece_bytes, [&](auto type) {
    using Piece = decltype(type);
    for_pieces<Piece, T, kMaxC>(C, [&](int i) {
      constexpr int kPer = sizeof(Piece) < sizeof(T) ? 1 : sizeof(Piece) / sizeof(T);
      T elements[kPer];
#pragma unroll
      for (int k = 0; k < kPer; ++k) elements[k] = static_cast<T>(x[i * kPer + k]);
      Piece piece;
      std::memcpy(&piece, elements, sizeof(Piece));
      reinterpret_cast<Piece*>(to)[i] = piece;
    });
  });
}

template <typename T, int kMaxC>
__global__ void __launch_bounds__(kFewThreads)
    few_forward_kernel(Problem<T, float> problem, int64_t rows_per_block, int piece_bytes,
                       Outputs<T, float> out) {
  const RowLayout& layout = problem.layout;
  const int C = static_cast<int>(layout.C);
  Sums sums;
  for (int64_t r = threadIdx.x; r < rows_per_block; r += kFewThreads) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + r;
    if (row >= layout.rows) break;
    const TargetClass<float> target = problem.target_class(row);
    float x[kMaxC];
    load_row(problem.x + row * layout.row_stride(kInput), C, piece_bytes, x);

    // 1. Maximum, sum of exponentials, and the target's logit.
    Softmax<T> softmax;
    RowExtras extras;
    extras.y = target.valid ? static_cast<int>(target.y) : -1;
    extras.reference = reference_of(x[0]);
#pragma unroll
    for (int c = 0; c < kMaxC; ++c) {
      if (c >= C) continue;
      softmax.m = fmaxf(softmax.m, x[c]);
      if (c == extras.y) extras.x_y = x[c];
    }
#pragma unroll
    for (int c = 0; c < kMaxC; ++c) {
      if (c >= C) continue;
      softmax.sum += exp_of<T>(x[c] - softmax.base());
      extras.add(x[c], c);
    }

    // 2. The row's loss.
    const float log_sum = std::log(softmax.sum);
    const float loss = row_loss(problem, target, softmax.m, log_sum, extras);
    out.save_row(row, layout.rows, softmax.m, log_sum);
    if (out.each) out.set_loss(row, loss);
    sums.loss += loss, sums.weight += target.weight;
    sums.hits += target.valid && !extras.beaten;
  }
  finish<kFewThreads>(sums, out, layout.rows);
}

template <typename T, int kMaxC>
__global__ void __launch_bounds__(kFewThreads)
    few_backward_kernel(Problem<T, float> problem, int piece_bytes, const float* saved,
                        Scale<T, float> scale, T* grad) {
  const RowLayout& layout = problem.layout;
  const int C = static_cast<int>(layout.C);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFewThreads + threadIdx.x;
  if (row >= layout.rows) return;
  const TargetClass<float> target = problem.target_class(row);
  float x[kMaxC];
  load_row(problem.x + row * layout.row_stride(kInput), C, piece_bytes, x);
  const int y = target.valid ? static_cast<int>(target.y) : -1;
  float x_y = 0;
#pragma unroll
  for (int c = 0; c < kMaxC; ++c)
    if (c == y) x_y = x[c];
  const RowGradient<T> gradient(problem, target, saved[row], saved[layout.rows + row], x_y,
                                scale.of(row));
#pragma unroll
  for (int c = 0; c < kMaxC; ++c)
    if (c < C) x[c] = target.ignored ? 0.f : c == y ? gradient.of_target : gradient(x[c]);
  store_row(grad + row * layout.row_stride(kGrad), C, piece_bytes, x);
}

}  // namespace fastcls::cuda
