// cross_entropy on CUDA, plain kernels: every dtype, stride, target and number of classes.
//
// Fused: log-softmax, the target's weights, smoothing, ignored rows and the reduction. Never
// written to memory: probabilities, log-probabilities, one-hot targets, casts of the logits. The
// maths is in cpu/cross_entropy_general.h.
//
//   forward_kernel    a group of threads owns one row at a time, a block a fixed chunk of rows; it
//                     writes two saved values per row, and the loss per row or the chunk's sum
//   finish_kernel     one block adds up the chunks, in a fixed order: no atomics
//   backward_kernel   a group of threads owns one row and writes its gradient
//
// A class index outside [0, C) is never used as an address: it makes its row's loss and gradient
// NaN. Finding out on the host would make the host wait.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/common.h"

namespace fastcls::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPartialSums = 3;  // of a chunk: losses, weights, hits

template <typename Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <typename Acc>
constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();

// Threads to a row: 1 where a row is short, or where neighbouring rows and not neighbouring classes
// lie side by side in memory; a warp up to the length at which each lane has 64 classes; else a
// block. Depends on the shape alone, as sums must not depend on the device.
int threads_per_row(const RowLayout& layout) {
  if (layout.C <= 16 || layout.class_stride[kInput] != 1) return 1;
  return layout.C <= 64 * kWarpSize ? kWarpSize : kThreads;
}

// At most 1024 chunks of rows, so that finish_kernel has little to add.
int64_t rows_per_block(int64_t rows, int group) {
  const int64_t at_once = kThreads / group;
  const int64_t turns = (rows + at_once * 1024 - 1) / (at_once * 1024);
  return std::max<int64_t>(turns, 1) * at_once;
}

// ---- what the kernels read

template <typename T, typename Acc>
struct Problem {
  RowLayout layout;
  const T* x;
  const void* target;  // class indices, flat; or probabilities like x, of T or Acc
  ScalarType target_type;
  bool prob, wide_prob;
  const void* weight;  // [C] of T or Acc, or null
  int64_t weight_stride;
  bool wide_weight;
  int64_t ignore_index;
  Acc keep, spread;  // 1 - smoothing, smoothing / C

  __device__ Acc weight_of(int64_t c) const {
    if (!weight) return Acc(1);
    const int64_t i = c * weight_stride;
    return wide_weight ? static_cast<const Acc*>(weight)[i]
                       : static_cast<Acc>(static_cast<const T*>(weight)[i]);
  }
  // The target's share of class c, for probabilities at `offset`.
  __device__ Acc probability(int64_t offset) const {
    return wide_prob ? static_cast<const Acc*>(target)[offset]
                     : static_cast<Acc>(static_cast<const T*>(target)[offset]);
  }
  __device__ int64_t index(int64_t row) const {
    switch (target_type) {
      case ScalarType::Byte:
        return static_cast<const uint8_t*>(target)[row];
      case ScalarType::Char:
        return static_cast<const int8_t*>(target)[row];
      case ScalarType::Short:
        return static_cast<const int16_t*>(target)[row];
      case ScalarType::Int:
        return static_cast<const int32_t*>(target)[row];
      case ScalarType::UInt16:
        return static_cast<const uint16_t*>(target)[row];
      case ScalarType::UInt32:
        return static_cast<const uint32_t*>(target)[row];
      default:  // int64 and uint64, whose upper half is out of range under either name
        return static_cast<const int64_t*>(target)[row];
    }
  }
  __device__ bool in_range(int64_t y) const { return y >= 0 && y < layout.C; }
};

// ---- device helpers

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

// The sum of `value` over the block, in thread 0, always in the same order.
__device__ inline double reduce_block(double value) {
  SHARED_ARRAY(double, of_thread, kThreads);
  of_thread[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = of_thread[0];
  __syncthreads();
  return sum;
}

// ---- kernels

template <typename T, typename Acc, int kGroup>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Problem<T, Acc> problem, int64_t rows_per_block, Acc* saved, T* row_loss,
                   Acc* wide_row_loss, bool count_hits, double* partial) {
  const RowLayout& layout = problem.layout;
  const int64_t C = layout.C, x_class = layout.class_stride[kInput];
  const int64_t t_class = layout.class_stride[kTarget];
  const int lane = threadIdx.x % kGroup;
  double loss_sum = 0, weight_sum = 0, hits = 0;
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
    Acc sum = 0, q_sum = 0, q_dot = 0;
    for (int64_t c = first; c < C; c += kGroup) {
      const Acc below = static_cast<Acc>(x[c * x_class]) - m;
      sum += std::exp(below);
      if (!dense) continue;
      Acc q = problem.spread;
      if (problem.prob) q += problem.keep * problem.probability(t + c * t_class);
      q *= problem.weight_of(c);
      q_sum += q;
      q_dot -= q * below;
    }
    const Acc log_sum = std::log(reduce_row<kGroup>(sum, Sum()));
    if (dense) q_sum = reduce_row<kGroup>(q_sum, Sum()), q_dot = reduce_row<kGroup>(q_dot, Sum());
    int beaten = 0;  // by a NaN, or by a class before the target's that reaches the maximum
    if (count_hits) {
      const int64_t y = active ? problem.index(row) : 0;
      for (int64_t c = first; c < C; c += kGroup) {
        const Acc value = static_cast<Acc>(x[c * x_class]);
        beaten |= !(c < y ? value < m : value <= m);
      }
      beaten = reduce_row<kGroup>(beaten, Max());
    }
    if (!active || lane != 0) continue;

    // 3. The row's loss: sum of q (log_sum + m - x).
    Acc loss = dense ? q_sum * log_sum + q_dot : Acc(0), weight = 1;
    if (!problem.prob) {
      const int64_t y = problem.index(row);
      if (y == problem.ignore_index) {
        loss = weight = 0;
      } else if (!problem.in_range(y)) {
        loss = kNaN<Acc>;
      } else {
        weight = problem.weight_of(y);
        const Acc x_y = static_cast<Acc>(x[y * x_class]);
        loss += problem.keep * weight * (log_sum - (x_y - m));
        hits += !beaten && x_y == m;
      }
    }
    if (saved) saved[row] = m, saved[layout.rows + row] = log_sum;
    if (row_loss) row_loss[row] = static_cast<T>(loss);
    if (wide_row_loss) wide_row_loss[row] = loss;
    loss_sum += loss;
    weight_sum += weight;
  }
  if (!partial) return;
  loss_sum = reduce_block(loss_sum);
  weight_sum = reduce_block(weight_sum);
  if (count_hits) hits = reduce_block(hits);
  if (threadIdx.x != 0) return;
  double* sums = partial + kPartialSums * blockIdx.x;
  sums[0] = loss_sum, sums[1] = weight_sum, sums[2] = hits;
}

template <typename T, typename Acc>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* partial, int64_t blocks, bool mean, Acc* divisor, T* loss,
                  Acc* wide_loss, int64_t* hits) {
  double loss_sum = 0, weight_sum = 0, hit_sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) {
    const double* sums = partial + kPartialSums * b;
    loss_sum += sums[0], weight_sum += sums[1], hit_sum += sums[2];
  }
  loss_sum = reduce_block(loss_sum);
  weight_sum = reduce_block(weight_sum);
  hit_sum = reduce_block(hit_sum);
  if (threadIdx.x != 0) return;
  // PyTorch's mean of rows without weight is NaN whatever their losses are: one part is 0 / 0.
  if (weight_sum == 0) weight_sum = kNaN<double>;
  const double value = mean ? loss_sum / weight_sum : loss_sum;
  if (hits) *hits = static_cast<int64_t>(hit_sum);
  if (divisor) *divisor = static_cast<Acc>(weight_sum);
  if (loss) *loss = static_cast<T>(static_cast<Acc>(value));
  if (wide_loss) *wide_loss = static_cast<Acc>(value);
}

template <typename T, typename Acc, int kGroup>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Problem<T, Acc> problem, int64_t rows_per_block, const Acc* saved,
                    const T* grad_loss, const Acc* wide_grad_loss, int64_t reduction, T* grad) {
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
    const int64_t g = reduction == kNone ? row : 0;
    Acc scale = 1;  // where neither is given
    if (wide_grad_loss) scale = wide_grad_loss[g];
    if (grad_loss) scale = static_cast<Acc>(grad_loss[g]);
    if (reduction == kMean) scale /= saved[2 * layout.rows];
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

// ---- launchers

// Calls f(T, Acc) for the dtypes that the checks let through.
template <typename F>
void dispatch_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{}, float{});
    default:
      return f(torch::headeronly::Half{}, float{});
  }
}

template <typename F>
void dispatch_group(int group, const F& f) {
  if (group == 1) return f(std::integral_constant<int, 1>{});
  if (group == kWarpSize) return f(std::integral_constant<int, kWarpSize>{});
  return f(std::integral_constant<int, kThreads>{});
}

template <typename T, typename Acc>
Problem<T, Acc> make_problem(const RowLayout& layout, const CrossEntropyShape& s,
                             const Tensor& input, const Tensor& target,
                             const std::optional<Tensor>& weight, int64_t ignore_index,
                             double smoothing) {
  Problem<T, Acc> problem{};
  problem.layout = layout;
  problem.x = static_cast<const T*>(input.const_data_ptr());
  problem.target = target.const_data_ptr();
  problem.target_type = target.scalar_type();
  problem.prob = s.prob;
  problem.wide_prob = target.scalar_type() == accumulate_type(input.scalar_type());
  if (weight) {
    problem.weight = weight->const_data_ptr();
    problem.weight_stride = weight->stride(0);
    problem.wide_weight = weight->scalar_type() == accumulate_type(input.scalar_type());
  }
  problem.ignore_index = ignore_index;
  problem.keep = static_cast<Acc>(1 - smoothing);
  problem.spread = s.C == 0 ? Acc(0) : static_cast<Acc>(smoothing / s.C);
  return problem;
}

// A tensor's data if it has this dtype, else null: kernels take one pointer per dtype of the loss.
template <typename T>
T* data_if(const Tensor& t, bool matches) {
  return matches ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// The gradient of the logits; that of a result whose own gradient is 1 where grad_loss is missing.
Tensor launch_backward(const std::optional<Tensor>& grad_loss, const Tensor& input,
                       const Tensor& target, const std::optional<Tensor>& weight,
                       const Tensor& saved, const CrossEntropyShape& s, int64_t ignore_index,
                       int64_t reduction, double label_smoothing) {
  Tensor grad = new_like(input);
  const RowLayout layout =
      row_layout("cross_entropy_backward", s, {&input, s.prob ? &target : nullptr, &grad});
  if (grad.numel() == 0) return grad;
  const Tensor flat = s.prob ? target : torch::stable::contiguous(target);
  const ScalarType type = input.scalar_type();
  const bool wide_grad = grad_loss && grad_loss->scalar_type() == accumulate_type(type);
  const int group = threads_per_row(layout);
  const int64_t chunk = rows_per_block(layout.rows, group);
  const int64_t blocks = (layout.rows + chunk - 1) / chunk;
  const Launcher launch(input);
  dispatch_types(type, [&](auto t, auto acc) {
    using T = decltype(t);
    using Acc = decltype(acc);
    const Problem<T, Acc> problem = make_problem<T, Acc>(
        layout, s, input, flat, weight, ignore_index, effective_smoothing(label_smoothing));
    const void* g = grad_loss ? grad_loss->const_data_ptr() : nullptr;
    dispatch_group(group, [&](auto threads) {
      launch(backward_kernel<T, Acc, decltype(threads)::value>, dim3(blocks), kThreads, problem,
             chunk, static_cast<const Acc*>(saved.const_data_ptr()),
             wide_grad ? nullptr : static_cast<const T*>(g),
             wide_grad ? static_cast<const Acc*>(g) : nullptr, reduction,
             static_cast<T*>(grad.mutable_data_ptr()));
    });
  });
  return grad;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target,
                                                         const std::optional<Tensor>& weight,
                                                         int64_t ignore_index, int64_t reduction,
                                                         double label_smoothing, bool float_loss,
                                                         int64_t save, bool count_hits) {
  const char* op = "cross_entropy";
  const CrossEntropyShape s =
      check_cross_entropy(op, input, target, weight, ignore_index, reduction, label_smoothing);
  check_cross_entropy_outputs(op, s, save, count_hits);
  const RowLayout layout = row_layout(op, s, {&input, s.prob ? &target : nullptr, nullptr});
  const ScalarType type = input.scalar_type();
  const ScalarType loss_type = float_loss ? accumulate_type(type) : type;
  const bool wide_loss = loss_type == accumulate_type(type), each = reduction == kNone;
  Tensor loss = empty_flat(each ? s.batch : std::vector<int64_t>{}, loss_type, input);
  const Tensor rows = empty_saved(save ? kSaveRows : kSaveNothing, layout.rows, input);
  const Tensor hits = empty_hits(count_hits, input);
  const Tensor flat = s.prob ? target : torch::stable::contiguous(target);
  const int group = threads_per_row(layout);
  // Without logits every sum is 0 and every mean NaN, as in PyTorch.
  const int64_t chunk = rows_per_block(layout.rows, group);
  const int64_t blocks = layout.C == 0 && !each ? 0 : (layout.rows + chunk - 1) / chunk;
  const bool sums_wanted = !each || count_hits;
  const Tensor partial =
      empty_flat({sums_wanted ? kPartialSums * blocks : 0}, ScalarType::Double, input);
  const Launcher launch(input);
  dispatch_types(type, [&](auto t, auto acc) {
    using T = decltype(t);
    using Acc = decltype(acc);
    const Problem<T, Acc> problem = make_problem<T, Acc>(
        layout, s, input, flat, weight, ignore_index, effective_smoothing(label_smoothing));
    Acc* save_to = data_if<Acc>(rows, save);
    T* narrow = data_if<T>(loss, !wide_loss);
    Acc* wide = data_if<Acc>(loss, wide_loss);
    double* sums = data_if<double>(partial, sums_wanted);
    if (blocks > 0)
      dispatch_group(group, [&](auto threads) {
        launch(forward_kernel<T, Acc, decltype(threads)::value>, dim3(blocks), kThreads, problem,
               chunk, save_to, each ? narrow : nullptr, each ? wide : nullptr, count_hits, sums);
      });
    if (sums_wanted)
      launch(finish_kernel<T, Acc>, dim3(1), kThreads, static_cast<const double*>(sums), blocks,
             reduction == kMean, save_to ? save_to + 2 * layout.rows : nullptr,
             each ? nullptr : narrow, each ? nullptr : wide, data_if<int64_t>(hits, count_hits));
  });
  if (save != kSaveGrad) return {loss, rows, hits};
  return {loss,
          launch_backward(std::nullopt, input, flat, weight, rows, s, ignore_index, reduction,
                          label_smoothing),
          hits};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              const std::optional<Tensor>& weight, const Tensor& saved,
                              int64_t ignore_index, int64_t reduction, double label_smoothing) {
  const char* op = "cross_entropy_backward";
  const CrossEntropyShape s =
      check_cross_entropy(op, input, target, weight, ignore_index, reduction, label_smoothing);
  check_cross_entropy_backward(s, grad_loss, input, saved, reduction);
  return launch_backward(torch::stable::contiguous(grad_loss), input, target, weight, saved, s,
                         ignore_index, reduction, label_smoothing);
}

}  // namespace fastcls::cuda
