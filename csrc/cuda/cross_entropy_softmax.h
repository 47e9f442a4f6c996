// One row of logits with neighbouring classes and a class index: its exponentials, its loss and its
// gradient, for the kernels of few classes and those of vectors.
#pragma once

#include <type_traits>

#include "cuda/cross_entropy_common.h"

namespace fastcls::cuda {

constexpr float kLog2E = 1.44269504f;

// exp(x) for x <= 0. The hardware's exponential errs by 2^-22 or so, which 16-bit logits can't
// show; it is what leaves the kernels waiting for memory and not for arithmetic.
template <typename T>
__device__ float exp_of(float x) {
  if constexpr (std::is_same_v<T, float>) return std::exp(x);
  return exp2_approx(kLog2E * x);
}

// Maximum and sum of exp(x - maximum), of part of a row or all of it. A NaN leaves the maximum as
// it is and makes the sum NaN.
template <typename T>
struct Softmax {
  float m = -kInfinity<float>, sum = 0;

  // What logits are taken from: -inf - -inf would be NaN where exp is to be 0.
  __device__ float base() const { return m == -kInfinity<float> ? 0.f : m; }
  __device__ void raise(float maximum) {
    const float old = m;
    m = fmaxf(m, maximum);
    sum *= exp_of<T>(old - base());
  }
};

// What there is to know of a row besides its softmax.
struct RowExtras {
  float below = 0;  // sum of (x - reference), where labels are smoothed
  int beaten = 0;   // by a NaN, or by a class that argmax would prefer to the target's
  float reference = 0;
  float x_y = 0;  // the target's logit
  int y = -1;

  __device__ void add(float x, int c) {
    below += x - reference;
    beaten |= !(c < y ? x < x_y : x <= x_y);
  }
};

// Any finite number will do; near the logits, their sum keeps its digits.
__device__ inline float reference_of(float x) { return x - x == 0 ? x : 0.f; }

// Sum of q (log_sum + m - x) over the row.
template <typename T>
__device__ float row_loss(const Problem<T, float>& problem, const TargetClass<float>& target,
                          float m, float log_sum, const RowExtras& extras) {
  if (target.ignored) return 0;
  if (!target.valid) return kNaN<float>;
  float loss = problem.keep * target.weight * (log_sum - (extras.x_y - m));
  if (problem.spread > 0) {
    const float C = static_cast<float>(problem.layout.C);
    loss += problem.spread * (C * log_sum + (C * (m - extras.reference) - extras.below));
  }
  return loss;
}

// d loss / d x = scale (Q p - q); q is `spread` for each class and more of it for the target.
template <typename T>
struct RowGradient {
  float m, log_sum;
  float factor, offset;  // scale Q, and scale `spread`, of which an infinite scale makes no NaN
  float of_target;

  // x_y: the target's logit, where there is one.
  __device__ RowGradient(const Problem<T, float>& problem, const TargetClass<float>& target,
                         float m, float log_sum, float x_y, float scale)
      : m(m), log_sum(std::is_same_v<T, float> ? log_sum : kLog2E * log_sum) {
    const float spread = problem.spread, all = spread * static_cast<float>(problem.layout.C);
    const float at_target = target.valid ? problem.keep * target.weight : 0.f;
    if (!target.valid) scale = kNaN<float>;
    factor = scale * (all + at_target);
    offset = spread > 0 ? scale * spread : 0.f;
    // The surer the right prediction the less is left of p - 1: not from a rounded p.
    const float below_1 = std::expm1((x_y - m) - log_sum);
    of_target = scale * (at_target * below_1 + (all * (below_1 + 1) - spread));
  }
  // Of every class but the target's.
  __device__ float operator()(float x) const {
    if constexpr (std::is_same_v<T, float>) return factor * std::exp((x - m) - log_sum) - offset;
    return factor * exp2_approx(kLog2E * (x - m) - log_sum) - offset;  // log_sum times kLog2E too
  }
};

}  // namespace fastcls::cuda
