// cross_entropy, plain kernels: every dtype, stride, target and number of classes.
//
//   general_forward_kernel    a group of threads owns one row at a time, a block a fixed chunk of
//                             rows; three passes over the row
//   general_backward_kernel   a group of threads owns one row and writes its gradient
#pragma once

#include "cuda/cross_entropy_common.h"

namespace fastcls::cuda {

constexpr int kThreads = 256;

// The sum or maximum of `value` over the kGroup threads of a row, in every one of them. All threads
// of the block call it together.
template <int kGroup, typename V, typename Op>
__device__ V reduce_row(V value, const Op& op) {
  if constexpr (kGroup >= kWarpSize)
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
      value = op(value, __shfl_xor_sync(kFullWarp, value, lanes));
  if constexpr (kGroup > kWarpSize) {
    SHARED_ARRAY(V, of_warp, kThreads / kWarpSize);
    if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = of_warp[0];
    for (int w = 1; w < kThreads / kWarpSize; ++w) value = op(value, of_warp[w]);
    __syncthreads();  // of_warp is written again by the next call
  }
  return value;
}

// A sum that carries along what rounding has cut off: of the thousands of terms that one thread may
// add, a plain one would lose a digit. Terms and sum have to be finite.
template <typename Acc>
struct CarefulSum {
  Acc sum = 0, excess = 0;

  __device__ void add(Acc term) {
    const Acc corrected = term - excess, next = sum + corrected;
    excess = (next - sum) - corrected;
    sum = next;
  }
};

struct Sum {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// NaN may be lost here: exp(NaN - maximum) brings it back.
struct Max {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

template <typename T, typename Acc, int kGroup>
__global__ void __launch_bounds__(kThreads)
    general_forward_kernel(Problem<T, Acc> problem, int64_t rows_per_block, Outputs<T, Acc> out) {
  const RowLayout& layout = problem.layout;
  const int64_t C = layout.C, x_class = layout.class_stride[kInput];
  const int64_t t_class = layout.class_stride[kTarget];
  const int lane = threadIdx.x % kGroup;
  Sums sums;
  for (int64_t r = threadIdx.x / kGroup; r < rows_per_block; r += kThreads / kGroup) {
    // All threads take part in the reductions, those beyond the last row with empty sums.
    const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + r;
    const bool active = row < layout.rows;
    const T* x = problem.x + (active ? layout.offset(kInput, row) : 0);
    const int64_t t = active && problem.prob ? layout.offset(kTarget, row) : 0;
    const int64_t first = active ? lane : C;

    // 1. The maximum.
    Acc m = -kInfinity<Acc>;
    for (int64_t c = first; c < C; c += kGroup) m = Max()(m, static_cast<Acc>(x[c * x_class]));
    m = reduce_row<kGroup>(m, Max());

    // 2. Sum of exp(x - m); for the parts of the target that reach every class, sum of q and of
    //    q (m - x).
    const bool dense = problem.prob || problem.spread > 0;
    CarefulSum<Acc> sum;
    Acc q_sum = 0, q_dot = 0;
    for (int64_t c = first; c < C; c += kGroup) {
      const Acc below = static_cast<Acc>(x[c * x_class]) - m;
      sum.add(std::exp(below));
      if (!dense) continue;
      Acc q = problem.spread;
      if (problem.prob) q += problem.keep * problem.probability(t + c * t_class);
      q *= problem.weight_of(c);
      q_sum += q;
      q_dot -= q * below;
    }
    const Acc log_sum = std::log(reduce_row<kGroup>(sum.sum, Sum()));
    if (dense) q_sum = reduce_row<kGroup>(q_sum, Sum()), q_dot = reduce_row<kGroup>(q_dot, Sum());
    int beaten = 0;  // by a NaN, or by a class before the target's that reaches the maximum
    if (out.hits) {
      const int64_t y = active ? problem.index(row) : 0;
      for (int64_t c = first; c < C; c += kGroup) {
        const Acc value = static_cast<Acc>(x[c * x_class]);
        beaten |= !(c < y ? value < m : value <= m);
      }
      beaten = reduce_row<kGroup>(beaten, Max());
    }
    if (!active || lane != 0) continue;

    // 3. The row's loss: sum of q (log_sum + m - x).
    Acc loss = dense && C > 0 ? q_sum * log_sum + q_dot : Acc(0), weight = 1;
    if (!problem.prob) {
      const TargetClass<Acc> target = problem.target_class(row);
      weight = target.weight;
      if (target.valid) {
        const Acc x_y = static_cast<Acc>(x[target.y * x_class]);
        loss += problem.keep * weight * (log_sum - (x_y - m));
        sums.hits += !beaten && x_y == m;
      } else {
        loss = target.ignored ? Acc(0) : kNaN<Acc>;
      }
    }
    out.save_row(row, layout.rows, m, log_sum);
    if (out.each) out.set_loss(row, loss);
    sums.loss += loss, sums.weight += weight;
  }
  finish<kThreads>(sums, out, layout.rows);
}

template <typename T, typename Acc, int kGroup>
__global__ void __launch_bounds__(kThreads)
    general_backward_kernel(Problem<T, Acc> problem, int64_t rows_per_block, const Acc* saved,
                            Scale<T, Acc> scale_of, T* grad) {
  const RowLayout& layout = problem.layout;
  const int64_t C = layout.C, x_class = layout.class_stride[kInput];
  const int64_t t_class = layout.class_stride[kTarget], g_class = layout.class_stride[kGrad];
  const int lane = threadIdx.x % kGroup;
  for (int64_t r = threadIdx.x / kGroup; r < rows_per_block; r += kThreads / kGroup) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + r;
    const bool active = row < layout.rows;
    const T* x = problem.x + (active ? layout.offset(kInput, row) : 0);
    const int64_t t = active && problem.prob ? layout.offset(kTarget, row) : 0;
    const int64_t first = active ? lane : C;
    auto dense = [&](int64_t c) {
      Acc q = problem.spread;
      if (problem.prob) q += problem.keep * problem.probability(t + c * t_class);
      return problem.weight_of(c) * q;
    };

    // 1. Q, the sum of q.
    Acc q_sum = 0;
    if (problem.prob || problem.spread > 0) {
      for (int64_t c = first; c < C; c += kGroup) q_sum += dense(c);
      q_sum = reduce_row<kGroup>(q_sum, Sum());
    }
    if (!active) continue;
    const int64_t y = problem.prob ? -1 : problem.index(row);
    const bool ignored = !problem.prob && y == problem.ignore_index;
    const bool valid = problem.prob || problem.in_range(y);
    const Acc at_target = valid && !problem.prob ? problem.keep * problem.weight_of(y) : Acc(0);
    q_sum += at_target;

    // 2. scale (Q p - q).
    Acc scale = scale_of.of(row);
    if (!valid) scale = kNaN<Acc>;
    const Acc m = saved[row], log_sum = saved[layout.rows + row];
    T* out = grad + layout.offset(kGrad, row);
    for (int64_t c = first; c < C; c += kGroup) {
      const Acc p = std::exp((static_cast<Acc>(x[c * x_class]) - m) - log_sum);
      const Acc hit = c == y ? at_target : Acc(0);
      const Acc value = scale * ((q_sum * p - dense(c)) - hit);
      out[c * g_class] = static_cast<T>(ignored ? Acc(0) : value);
    }
  }
}

}  // namespace fastcls::cuda
