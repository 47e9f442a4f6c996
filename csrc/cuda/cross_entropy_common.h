// What all cross-entropy kernels share: what they read, what they write, and the sums over rows.
#pragma once

#include <cmath>
#include <limits>

#include "cross_entropy.h"
#include "cuda/device.h"
#include "ops.h"

namespace fastcls::cuda {

template <typename Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <typename Acc>
constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();

// ---- what the kernels read

// The class index of a row. Outside [0, C) it is never used as an address.
template <typename Acc>
struct TargetClass {
  int64_t y;
  bool ignored, valid;  // valid: neither ignored nor out of range
  Acc weight;           // that the row has in the mean's divisor
};

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
  __device__ TargetClass<Acc> classify(int64_t y) const {
    const bool ignored = y == ignore_index, valid = !ignored && in_range(y);
    return {y, ignored, valid, valid ? weight_of(y) : Acc(!ignored)};
  }
  __device__ TargetClass<Acc> target_class(int64_t row) const { return classify(index(row)); }
};

// The gradient that the rows' own gradients of an op are multiplied with.
template <typename T, typename Acc>
struct Scale {
  const T* grad_loss;  // one of the two; where neither is given, 1
  const Acc* wide_grad_loss;
  bool each;           // one per row
  const Acc* divisor;  // of the mean, or null

  __device__ Acc of(int64_t row) const {
    const int64_t i = each ? row : 0;
    Acc scale = 1;
    if (wide_grad_loss) scale = wide_grad_loss[i];
    if (grad_loss) scale = static_cast<Acc>(grad_loss[i]);
    return divisor ? scale / *divisor : scale;
  }
};

// ---- what a forward pass writes

struct Sums {
  double loss = 0, weight = 0, hits = 0;
};

template <typename T, typename Acc>
struct Outputs {
  Acc* saved;  // [2 rows + 1], or null
  bool each;   // a loss per row
  bool mean;   // else the sum
  T* loss;     // one of the two, or neither
  Acc* wide_loss;
  int64_t* hits;      // or null
  bool sums;          // over rows: wanted for the loss, the divisor or the hits
  Sums* of_block;     // [blocks], null for one block
  unsigned* counter;  // 0 before and after the launch; null: finish_kernel is launched

  __device__ void set_loss(int64_t i, Acc value) const {
    if (loss) loss[i] = static_cast<T>(value);
    if (wide_loss) wide_loss[i] = value;
  }
  __device__ void save_row(int64_t row, int64_t rows, Acc maximum, Acc log_sum) const {
    if (saved) saved[row] = maximum, saved[rows + row] = log_sum;
  }
};

// ---- sums over rows: in double, in an order that depends on the shape alone

// Over the block's kThreads, in thread 0.
template <int kThreads>
__device__ Sums reduce_block(Sums sums) {
  SHARED_ARRAY(double, of_warp, 3 * (kThreads / kWarpSize));
  double values[3] = {sums.loss, sums.weight, sums.hits};
  for (double& value : values)
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
      value += __shfl_xor_sync(kFullWarp, value, lanes);
  if (threadIdx.x % kWarpSize == 0)
    for (int i = 0; i < 3; ++i) of_warp[threadIdx.x / kWarpSize * 3 + i] = values[i];
  __syncthreads();
  sums = {};
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / kWarpSize; ++w) {
      sums.loss += of_warp[3 * w], sums.weight += of_warp[3 * w + 1];
      sums.hits += of_warp[3 * w + 2];
    }
  return sums;
}

template <typename T, typename Acc>
__device__ void write_result(Sums sums, const Outputs<T, Acc>& out, int64_t rows) {
  // PyTorch's mean of rows without weight is NaN whatever their losses are: one part is 0 / 0.
  if (out.mean && sums.weight == 0) sums.weight = kNaN<double>;
  if (out.hits) *out.hits = static_cast<int64_t>(sums.hits);
  if (out.saved) out.saved[2 * rows] = static_cast<Acc>(sums.weight);
  if (!out.each) out.set_loss(0, static_cast<Acc>(out.mean ? sums.loss / sums.weight : sums.loss));
}

template <int kThreads, typename T, typename Acc>
__device__ void add_blocks(const Outputs<T, Acc>& out, int64_t blocks, int64_t rows) {
  Sums sums;
  // Other multiprocessors may have written them just now: past the first-level cache. A thread asks
  // for several at a time: the whole launch waits for this.
#pragma unroll 8
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) {
    const Sums& of_block = out.of_block[b];
    sums.loss += load_shared_by_blocks(&of_block.loss);
    sums.weight += load_shared_by_blocks(&of_block.weight);
    sums.hits += load_shared_by_blocks(&of_block.hits);
  }
  sums = reduce_block<kThreads>(sums);
  if (threadIdx.x == 0) write_result(sums, out, rows);
}

// The end of a forward kernel, called by all threads, where thread 0 has the block's sums. The
// block that comes last adds up the blocks.
template <int kThreads, typename T, typename Acc>
__device__ void finish_block(const Sums& sums, const Outputs<T, Acc>& out, int64_t rows) {
  if (!out.sums) {  // nobody divides by it, but what is returned is written
    if (out.saved && blockIdx.x == 0 && threadIdx.x == 0) out.saved[2 * rows] = Acc(0);
    return;
  }
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) write_result(sums, out, rows);
    return;
  }
  SHARED_ARRAY(int, last, 1);
  if (threadIdx.x == 0) {
    out.of_block[blockIdx.x] = sums;
    const unsigned blocks = gridDim.x;
    last[0] = out.counter && count_after_writing(out.counter, blocks - 1) == blocks - 1;
  }
  __syncthreads();
  if (last[0]) add_blocks<kThreads>(out, gridDim.x, rows);
}

// The same where each thread has sums of its own.
template <int kThreads, typename T, typename Acc>
__device__ void finish(Sums sums, const Outputs<T, Acc>& out, int64_t rows) {
  if (out.sums) sums = reduce_block<kThreads>(sums);
  finish_block<kThreads>(sums, out, rows);
}

constexpr int kFinishThreads = 256;

// The same as a launch of its own: without a counter, and where there are no rows to launch for.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(Outputs<T, Acc> out, int64_t blocks, int64_t rows) {
  if (blocks == 0 && out.saved)
    for (int64_t i = threadIdx.x; i < 2 * rows; i += kFinishThreads) out.saved[i] = Acc(0);
  add_blocks<kFinishThreads>(out, blocks, rows);
}

}  // namespace fastcls::cuda
