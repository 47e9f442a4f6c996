// cross_entropy of more classes that are neighbours in memory: a warp or a block owns a row and
// reads it in vectors of 16 bytes, once.
//
// Maximum and sum of exponentials grow together: what was summed is multiplied by
// exp(old - new maximum) wherever a batch of vectors raises the maximum. A row may start anywhere:
// elements before its first whole vector and after its last one, less than two vectors of them, go
// one to a thread.
//
//   rows_forward_kernel     loss and what is saved; with kWithGrad the gradient too, from the same
//                           read: a thread keeps its first batch in registers and has the next
//                           ones copied to shared memory. Of what fits neither, the last part of
//                           the longest rows, the second read finds most in the second-level
//                           cache, as it starts with what was read last.
//   rows_backward_kernel    the gradient from two saved numbers per row
//   count_kernel            the divisor of the mean, from the targets alone
//   scale_kernel            multiplies a gradient where it lies; does nothing if the factor is 1
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "cuda/cross_entropy_softmax.h"

namespace fastcls::cuda {

constexpr int kBatch = 4;  // vectors that a thread asks for before it waits for the first
constexpr int kTaken = 2;  // that it takes at a time from shared memory, which is near

// Of a block: four warps where a warp owns a row.
template <int kGroup>
constexpr int kRowsThreads = kGroup < 128 ? 128 : kGroup;
// Blocks that a multiprocessor is to hold at least: 1024 threads have 64 registers each.
template <int kGroup>
constexpr int kRowsBlocks = 1024 / kRowsThreads<kGroup>;

// ---- a row as vectors

template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// The row's `edges` single elements and its `vectors` whole, aligned vectors.
template <typename T>
struct VectorRow {
  int head, vectors, edges;

  __device__ VectorRow(const T* x, int C) {
    const int skip = static_cast<int>(-reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    head = skip < C ? skip : C;
    vectors = (C - head) / kPerVector<T>;
    edges = C - vectors * kPerVector<T>;
  }
  __device__ int class_of_edge(int i) const { return i < head ? i : i + vectors * kPerVector<T>; }
  __device__ int class_of_vector(int i) const { return head + i * kPerVector<T>; }
};

template <typename T>
__device__ void unpack(const uint4& vector, float (&x)[kPerVector<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = float_of_bits(words[i]);
    } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
      x[2 * i] = float_of_bits(words[i] << 16);
      x[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
    } else {
      x[2 * i] = static_cast<float>(T(static_cast<uint16_t>(words[i]), T::from_bits()));
      x[2 * i + 1] = static_cast<float>(T(static_cast<uint16_t>(words[i] >> 16), T::from_bits()));
    }
  }
}

template <typename T>
__device__ uint4 pack(const float (&x)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = bits_of_float(x[i]);
    } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
      words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    } else {
      words[i] = pack_f16(x[2 * i], x[2 * i + 1]);
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// The larger ones of the elements of two words; a number rather than a NaN.
template <typename T>
__device__ uint32_t larger(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, float>)
    return bits_of_float(fmaxf(float_of_bits(a), float_of_bits(b)));
  else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    return max_bf16_pairs(a, b);
  else
    return max_f16_pairs(a, b);
}
// -infinity in each element of a word.
template <typename T>
constexpr uint32_t kLowest = std::is_same_v<T, torch::headeronly::Half> ? 0xfc00fc00u
                             : std::is_same_v<T, float>                 ? 0xff800000u
                                                                        : 0xff80ff80u;

// A thread's vectors are `first`, first + kGroup, …; those past the last one are left alone.
template <int kGroup, int kCount>
__device__ void load_batch(const uint4* from, int first, int vectors, uint4 (&batch)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (first + j * kGroup < vectors) batch[j] = from[first + j * kGroup];
}

// ---- the forward pass

// kFull: the row has all of the batch's vectors, and none is asked for.
template <typename T, int kGroup, bool kExtras, bool kFull, int kCount>
__device__ void add_batch(uint4 (&batch)[kCount], const VectorRow<T>& row, int first,
                          Softmax<T>* softmax, RowExtras* extras) {
  float x[kPerVector<T>];
  uint32_t top = kLowest<T>;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (!kFull && first + j * kGroup >= row.vectors) continue;
    const uint4& v = batch[j];
    top = larger<T>(top, larger<T>(larger<T>(v.x, v.y), larger<T>(v.z, v.w)));
  }
  unpack<T>(uint4{top, top, top, top}, x);
  softmax->raise(fmaxf(x[0], x[1]));  // all of the word, whether it has one element or two
  const float base = softmax->base();
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (!kFull && first + j * kGroup >= row.vectors) continue;
    forget(batch[j]);
    unpack<T>(batch[j], x);
    float sum = 0;  // apart, so that vectors do not wait for each other
#pragma unroll
    for (int k = 0; k < kPerVector<T>; ++k) {
      sum += exp_of<T>(x[k] - base);
      if constexpr (kExtras) extras->add(x[k], row.class_of_vector(first + j * kGroup) + k);
    }
    softmax->sum += sum;
  }
}

// Over kLanes neighbours, a power of 2, in each of them.
template <int kLanes, bool kExtras, typename T>
__device__ void reduce_lanes(Softmax<T>* softmax, RowExtras* extras) {
  float m = softmax->m;
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, lanes));
  softmax->raise(m);
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    softmax->sum += __shfl_xor_sync(kFullWarp, softmax->sum, lanes);
    if constexpr (kExtras) {
      extras->below += __shfl_xor_sync(kFullWarp, extras->below, lanes);
      extras->beaten |= __shfl_xor_sync(kFullWarp, extras->beaten, lanes);
    }
  }
}

// Over the kGroup threads of a row, in every one of them. `turn` counts the calls.
template <int kGroup, bool kExtras, typename T>
__device__ void reduce_group(int turn, Softmax<T>* softmax, RowExtras* extras) {
  reduce_lanes<kWarpSize, kExtras>(softmax, extras);
  if constexpr (kGroup > kWarpSize) {
    constexpr int kWarps = kGroup / kWarpSize, kValues = 4;
    // Two in turns: whoever is a row ahead does not overwrite what others have yet to read.
    SHARED_ARRAY(float, of_warps, 2 * kWarps * kValues);
    float* values = of_warps + turn % 2 * kWarps * kValues;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    if (lane == 0) {
      float* mine = values + warp * kValues;
      mine[0] = softmax->m, mine[1] = softmax->sum;
      if constexpr (kExtras) mine[2] = extras->below, mine[3] = static_cast<float>(extras->beaten);
    }
    __syncthreads();
    const float* of_lane = values + lane % kWarps * kValues;
    softmax->m = of_lane[0], softmax->sum = of_lane[1];
    if constexpr (kExtras) extras->below = of_lane[2], extras->beaten = of_lane[3] != 0;
    reduce_lanes<kWarps, kExtras>(softmax, extras);
  }
}

// ---- gradients

template <typename T>
__device__ uint4 gradient_of(const uint4& vector, int first_class, int y,
                             const RowGradient<T>& gradient) {
  float x[kPerVector<T>];
  unpack<T>(vector, x);
  // All but one vector of the row can do without comparing each class with the target's.
  if (y >= first_class && y < first_class + kPerVector<T>) {
#pragma unroll
    for (int k = 0; k < kPerVector<T>; ++k)
      x[k] = first_class + k == y ? gradient.of_target : gradient(x[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kPerVector<T>; ++k) x[k] = gradient(x[k]);
  }
  return pack<T>(x);
}

template <typename T, int kGroup, int kCount>
__device__ void store_gradients(uint4 (&batch)[kCount], const VectorRow<T>& row, int first, int y,
                                const RowGradient<T>& gradient, uint4* to) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int i = first + j * kGroup;
    if (i >= row.vectors) continue;
    forget(batch[j]);
    to[i] = gradient_of(batch[j], row.class_of_vector(i), y, gradient);
  }
}

template <typename T, int kGroup>
__device__ void store_zeros(const VectorRow<T>& row, int lane, T* grad) {
  uint4* to = reinterpret_cast<uint4*>(grad + row.head);
  for (int i = lane; i < row.vectors; i += kGroup) to[i] = uint4{0, 0, 0, 0};
  if (lane < row.edges) grad[row.class_of_edge(lane)] = static_cast<T>(0.f);
}

// ---- kernels

// Where the forward kernel writes gradients, and from what it takes the divisor of the mean.
template <typename T>
struct GradientOutput {
  T* grad;
  const double* weights;  // that count_kernel has summed, in `parts` parts; null: no divisor
  int parts;
  int stash;  // vectors that a thread may keep in shared memory

  __device__ float scale() const {
    if (!weights) return 1;
    double sum = 0;
    for (int i = 0; i < parts; ++i) sum += weights[i];
    return sum == 0 ? kNaN<float> : 1.f / static_cast<float>(sum);
  }
};

template <typename T, int kGroup, bool kExtras, bool kWithGrad>
__global__ void __launch_bounds__(kRowsThreads<kGroup>, kRowsBlocks<kGroup>)
    rows_forward_kernel(Problem<T, float> problem, int rows_per_block, Outputs<T, float> out,
                        GradientOutput<T> output) {
  constexpr int kBlockThreads = kRowsThreads<kGroup>, kGroups = kBlockThreads / kGroup;
  DYNAMIC_SHARED(shared);
  uint4* const stash = reinterpret_cast<uint4*>(shared) + threadIdx.x;
  const RowLayout& layout = problem.layout;
  const int lane = threadIdx.x % kGroup, rows = static_cast<int>(layout.rows);
  const float scale = kWithGrad ? output.scale() : 1.f;
  // Of lane 0, in memory: registers are what decides how much a multiprocessor reads at a time.
  SHARED_ARRAY(double, of_group, 3 * kGroups);
  double* const sums = of_group + threadIdx.x / kGroup * 3;
  if (lane == 0) sums[0] = sums[1] = sums[2] = 0;
  const int block_row = blockIdx.x * rows_per_block;
  const int end_row = rows - block_row < rows_per_block ? rows : block_row + rows_per_block;
  const int64_t distance = layout.row_stride(kInput);
  // Returns the row's target; its first batch is on its way then, unless the row is ignored. The
  // block's first rows do not wait for their targets: nothing else is on its way.
  auto ask_first = [&](int n, bool first, uint4(&batch)[kBatch]) {
    if (n >= end_row) return problem.ignore_index;
    const int64_t y = problem.index(n);
    if (y == problem.ignore_index && !first) return y;
    const T* x = problem.x + n * distance;
    const VectorRow<T> row(x, static_cast<int>(layout.C));
    load_batch<kGroup>(reinterpret_cast<const uint4*>(x + row.head), lane, row.vectors, batch);
    return y;
  };
  auto gradient_row = [&](int n) { return output.grad + n * layout.row_stride(kGrad); };
  uint4 kept[kBatch];
  int64_t y = 0;
  int reduced = 0;                           // rows, without the ignored ones
  int n = block_row + threadIdx.x / kGroup;  // the same for all threads of a barrier
  if constexpr (!kWithGrad) y = ask_first(n, true, kept);
  for (; n < end_row; n += kGroups) {
    if constexpr (kWithGrad) y = problem.index(n);
    const TargetClass<float> target = problem.classify(y);
    const T* x = problem.x + n * distance;
    const VectorRow<T> row(x, static_cast<int>(layout.C));
    if (target.ignored) {  // without reading it
      if constexpr (kWithGrad) store_zeros<T, kGroup>(row, lane, gradient_row(n));
      if constexpr (!kWithGrad) y = ask_first(n + kGroups, false, kept);
      if (lane == 0) {
        out.save_row(n, rows, 0.f, 0.f);
        if (out.each) out.set_loss(n, 0.f);
      }
      continue;
    }
    const uint4* from = reinterpret_cast<const uint4*>(x + row.head);
    // With a gradient, this thread's vectors that are not kept; a warp to a row keeps all of them.
    const int rest = lane + kBatch * kGroup, end = kGroup == kWarpSize ? 0 : row.vectors;

    // 1. Maximum and sum of exponentials.
    Softmax<T> softmax;
    RowExtras extras;
    uint4 batch[kWithGrad ? kTaken : kBatch];
    if constexpr (kWithGrad) {  // all that there is room for, before waiting for any of it
      load_batch<kGroup>(from, lane, row.vectors, kept);
#pragma unroll 1
      for (int s = 0; s < output.stash && rest + s * kGroup < end; ++s)
        copy_async(stash + s * kBlockThreads, from + rest + s * kGroup, false);
      copy_async_commit();
    }
    const bool at_edge = lane < row.edges;
    const int edge_class = row.class_of_edge(lane);
    const float edge = at_edge ? static_cast<float>(x[edge_class]) : -kInfinity<float>;
    extras.y = target.valid ? static_cast<int>(target.y) : -1;
    T at_target = static_cast<T>(0.f);
    if (target.valid) at_target = x[extras.y];
    if constexpr (kExtras) {
      extras.x_y = static_cast<float>(at_target);
      extras.reference = reference_of(static_cast<float>(x[0]));
    }
    softmax.m = fmaxf(softmax.m, edge);
    softmax.sum = exp_of<T>(edge - softmax.base());
    if (kExtras && at_edge) extras.add(edge, edge_class);
    // Vector `slot` and the following ones of those that are not kept.
    auto take = [&](int slot) {
#pragma unroll
      for (int j = 0; j < kTaken; ++j) {
        const int i = rest + (slot + j) * kGroup;
        if (i >= row.vectors) continue;
        batch[j] = slot + j < output.stash ? stash[(slot + j) * kBlockThreads] : from[i];
      }
    };
    if constexpr (kWithGrad) {
      add_batch<T, kGroup, kExtras, false>(kept, row, lane, &softmax, &extras);
      copy_async_wait<0>();
      for (int slot = 0; rest + slot * kGroup < end; slot += kTaken) {
        take(slot);
        add_batch<T, kGroup, kExtras, false>(batch, row, rest + slot * kGroup, &softmax, &extras);
      }
    } else {
      // Two batches in turns: one is on its way while the other one is added up.
      constexpr int kStep = kBatch * kGroup;
      auto ask_and_add = [&](int done, uint4(&added)[kBatch], uint4(&asked)[kBatch]) {
        const bool last = done + kStep >= row.vectors;
        if (!last) load_batch<kGroup>(from, done + kStep + lane, row.vectors, asked);
        // Without maxima of pairs, before 8.0, registers would not last for a whole batch at once.
        if (FASTCLS_SM80 && done + kStep <= row.vectors)
          add_batch<T, kGroup, kExtras, true>(added, row, done + lane, &softmax, &extras);
        else
          add_batch<T, kGroup, kExtras, false>(added, row, done + lane, &softmax, &extras);
        return last;
      };
      for (int done = 0;; done += 2 * kStep)
        if (ask_and_add(done, kept, batch) || ask_and_add(done + kStep, batch, kept)) break;
      y = ask_first(n + kGroups, false, kept);
    }
    reduce_group<kGroup, kExtras>(reduced++, &softmax, &extras);

    // 2. The row's loss. Its target's logit is not waited for until here where it can be helped.
    if constexpr (!kExtras) extras.x_y = static_cast<float>(at_target);
    const float log_sum = std::log(softmax.sum);
    if (lane == 0) {
      const float loss = row_loss(problem, target, softmax.m, log_sum, extras);
      out.save_row(n, rows, softmax.m, log_sum);
      if (out.each) out.set_loss(n, loss);
      sums[0] += loss, sums[1] += target.weight;
      sums[2] += target.valid && !extras.beaten;
    }

    // 3. Its gradient.
    if constexpr (kWithGrad) {
      const RowGradient<T> gradient(problem, target, softmax.m, log_sum, extras.x_y, scale);
      T* grad = gradient_row(n);
      uint4* to = reinterpret_cast<uint4*>(grad + row.head);
      if (at_edge)
        grad[edge_class] =
            static_cast<T>(edge_class == extras.y ? gradient.of_target : gradient(edge));
      store_gradients<T, kGroup>(kept, row, lane, extras.y, gradient, to);
      if (rest >= end) continue;
      const int last = (end - rest - 1) / (kTaken * kGroup);
      for (int b = last; b >= 0; --b) {
        take(b * kTaken);
        store_gradients<T, kGroup>(batch, row, rest + b * kTaken * kGroup, extras.y, gradient, to);
      }
    }
  }
  if constexpr (kGroups > 1) __syncthreads();
  Sums of_block;
  if (threadIdx.x == 0)
    for (int g = 0; g < kGroups; ++g) {
      of_block.loss += of_group[3 * g], of_block.weight += of_group[3 * g + 1];
      of_block.hits += of_group[3 * g + 2];
    }
  finish_block<kBlockThreads>(of_block, out, layout.rows);
}

template <typename T, int kGroup>
__global__ void __launch_bounds__(kRowsThreads<kGroup>, kRowsBlocks<kGroup>)
    rows_backward_kernel(Problem<T, float> problem, const float* saved, Scale<T, float> scale,
                         T* grad_input) {
  constexpr int kRows = kRowsThreads<kGroup> / kGroup;
  const RowLayout& layout = problem.layout;
  const int lane = threadIdx.x % kGroup;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kGroup;
  if (n >= layout.rows) return;
  const T* x = problem.x + n * layout.row_stride(kInput);
  T* grad = grad_input + n * layout.row_stride(kGrad);
  const VectorRow<T> row(x, static_cast<int>(layout.C));
  const TargetClass<float> target = problem.target_class(n);
  if (target.ignored) return store_zeros<T, kGroup>(row, lane, grad);
  const int y = target.valid ? static_cast<int>(target.y) : -1;
  const RowGradient<T> gradient(problem, target, saved[n], saved[layout.rows + n],
                                target.valid ? static_cast<float>(x[y]) : 0.f, scale.of(n));
  if (lane < row.edges) {
    const int c = row.class_of_edge(lane);
    const float edge = static_cast<float>(x[c]);
    grad[c] = static_cast<T>(c == y ? gradient.of_target : gradient(edge));
  }
  const uint4* from = reinterpret_cast<const uint4*>(x + row.head);
  uint4* to = reinterpret_cast<uint4*>(grad + row.head);
  uint4 batch[kBatch];
  for (int i = lane; i < row.vectors; i += kBatch * kGroup) {
    load_batch<kGroup>(from, i, row.vectors, batch);
    store_gradients<T, kGroup>(batch, row, i, y, gradient, to);
  }
}

constexpr int kCountThreads = 1024;

// The mean's divisor, a sum per block.
template <typename T>
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(Problem<T, float> problem, double* weights) {
  Sums sums;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCountThreads;
#pragma unroll 8
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kCountThreads + threadIdx.x;
       n < problem.layout.rows; n += step)
    sums.weight += problem.target_class(n).weight;
  sums = reduce_block<kCountThreads>(sums);
  if (threadIdx.x == 0) weights[blockIdx.x] = sums.weight;
}

constexpr int kScaleThreads = 256, kScaleBlocks = 1024;

// In place. Ignored rows stay 0, also where the factor is not finite.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(Problem<T, Acc> problem, Scale<T, Acc> factor, T* grad) {
  const Acc scale = factor.of(0);
  if (scale == Acc(1)) return;
  const RowLayout& layout = problem.layout;
  const int64_t C = layout.C, stride = layout.class_stride[kGrad];
  for (int64_t n = blockIdx.x; n < layout.rows; n += gridDim.x) {
    if (problem.index(n) == problem.ignore_index) continue;
    T* values = grad + layout.offset(kGrad, n);
    int64_t done = 0;
    if constexpr (sizeof(T) <= sizeof(float)) {
      if (stride == 1 && C <= (1 << 30)) {
        const VectorRow<T> row(values, static_cast<int>(C));
        uint4* vectors = reinterpret_cast<uint4*>(values + row.head);
#pragma unroll 4
        for (int i = threadIdx.x; i < row.vectors; i += kScaleThreads) {
          float x[kPerVector<T>];
          unpack<T>(vectors[i], x);
#pragma unroll
          for (int k = 0; k < kPerVector<T>; ++k) x[k] *= scale;
          vectors[i] = pack<T>(x);
        }
        if (static_cast<int>(threadIdx.x) < row.edges) {
          T& value = values[row.class_of_edge(threadIdx.x)];
          value = static_cast<T>(static_cast<Acc>(value) * scale);
        }
        done = C;
      }
    }
    for (int64_t c = done + threadIdx.x; c < C; c += kScaleThreads)
      values[c * stride] = static_cast<T>(static_cast<Acc>(values[c * stride]) * scale);
  }
}

}  // namespace fastcls::cuda
