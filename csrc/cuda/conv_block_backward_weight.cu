// dW and db of a conv block as a matrix product over the positions of the conv map.
//
//   rows: output channels     columns: taps x input channels     sum: positions of all images
//
// A block owns 32 rows and up to 72 units of 8 columns, and goes from box to box of its part of the
// conv map. Per box it loads the patch of the input once for all taps, as conv_block_gemm.h does,
// while it expands the map's gradient from pooled gradient and winners into shared memory,
// positions by channels. Both operands are read across their rows. Warps that share units take
// turns at the positions and are added up at the end, in order; so are the parts, by
// sum_chunks_kernel.
#include "cuda/conv_block_expand.h"
#include "cuda/conv_block_gemm.h"

namespace fastcls::cuda {

namespace {

constexpr int kGradThreads = 8 * kWarpSize;
constexpr int kGradFragments = kGradChannels / 16;
using GradSums = float[kGradFragments][kGradUnits][4];  // as in conv_block_gemm.h

// Bytes from a position's first tap to a column's value; beyond the last column those of the first.
template <typename Math, bool kGather>
__device__ int grad_column_offset(const ConvBlockShape& s, const GemmTile& t, int column) {
  const int C = static_cast<int>(s.C), kernel_w = static_cast<int>(s.kernel_w);
  int tap = column / 8 % t.taps, channel = column / 8 / t.taps * 8 + column % 8;
  if (kGather) tap = column / C, channel = column % C;
  if (tap >= t.taps || channel >= t.channels) return 0;
  return tap / kernel_w * static_cast<int>(s.dilation_h) * t.row_bytes +
         column_offset(t, tap % kernel_w * static_cast<int>(s.dilation_w)) +
         channel * static_cast<int>(sizeof(typename Math::Element));
}

// Where a column's gradient goes in a row of taps x C elements; -1: nowhere.
template <bool kGather>
__device__ int64_t grad_element(const ConvBlockShape& s, const GemmTile& t, int column, int chunk) {
  if (kGather) return column < t.taps * s.C ? column : -1;
  const int tap = column / 8 % t.taps, channel = column / 8 / t.taps * 8 + column % 8;
  const int64_t c = static_cast<int64_t>(chunk) * t.channels + channel;
  return channel < t.channels && c < s.C ? tap * s.C + c : -1;
}

// The gradients of the box's positions, [rows, channels], zeros after the last. Adds those of the
// thread's own channels, which are the same ones all the time, to its place in `bias_sums`: shared
// memory, for the sums of the product take most registers. With `rest`, what rounding has left out
// of them instead.
template <typename Math>
__device__ void expand_grads(const ConvBlockShape& s, const GemmTile& t,
                             const MapGrad<typename Math::Element>& grad, const Box& box,
                             int64_t k0, int row_bytes, unsigned char* to, float* bias_sums,
                             bool rest) {
  using Element = typename Math::Element;
  constexpr int kSize = Vector<Element>::kSize, kVectors = kGradChannels / kSize;
  static_assert(kGradThreads % kVectors == 0);
  const int vector = threadIdx.x % kVectors;
  const int rows = static_cast<int>(round_up(t.units, 16));
#pragma unroll 1  // registers are scarce
  for (int row = threadIdx.x / kVectors; row < rows; row += kGradThreads / kVectors) {
    const Unit u = unit_at(t, row);
    const int64_t n = box.n + u.image, k = k0 + vector * kSize;
    const int h = box.out_h + u.y, w = box.out_w + u.x;
    const bool inside = row < t.units && n < s.N && h < s.out_h && w < s.out_w && k < s.K;
    const auto rounded = [rest](float sum) {
      const Element nearest = Math::rounded(sum);
      return rest ? Math::rounded(sum - static_cast<float>(nearest)) : nearest;
    };
    grad.write(to + row * row_bytes + vector * 16, n, static_cast<int>(k), h, w, inside, rounded,
               rest ? nullptr : bias_sums + threadIdx.x * kSize);
  }
}

// ---- multiplying: a step of the sum is 16 positions of 16-bit elements, 8 of tf32, 1 of float.

template <typename Math, bool kGather>
__device__ void multiply_halves(const unsigned char* grads, int row_bytes,
                                const unsigned char* patch, const int* positions,
                                const int (&columns)[kGradUnits], int step, GradSums& sums) {
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
  const unsigned char* a_row = grads + (step * 16 + lane / 16 * 8 + lane % 8) * row_bytes;
  uint32_t a[kGradFragments][4];
#pragma unroll
  for (int m = 0; m < kGradFragments; ++m)
    load_matrices_transposed(a[m], a_row + m * 32 + lane / 8 % 2 * 16);
  const int* at = positions + step * 16;
#pragma unroll
  for (int j = 0; j < kGradUnits; ++j) {
    uint32_t b[2];
    if constexpr (kGather) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned char* column = patch + columns[j];
        const auto low = *reinterpret_cast<const uint16_t*>(column + at[8 * i + 2 * t]);
        const auto high = *reinterpret_cast<const uint16_t*>(column + at[8 * i + 2 * t + 1]);
        b[i] = low | static_cast<uint32_t>(high) << 16;
      }
    } else {
      load_matrices_transposed(b, patch + at[lane % 16] + columns[j]);
    }
#pragma unroll
    for (int m = 0; m < kGradFragments; ++m) Math::multiply(sums[m][j], a[m], b[0], b[1]);
  }
}

template <typename Math>
__device__ void multiply_tf32(const unsigned char* grads, int row_bytes, const unsigned char* patch,
                              const int* positions, const int (&columns)[kGradUnits], int step,
                              GradSums& sums) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  uint32_t a[kGradFragments][4];
#pragma unroll
  for (int m = 0; m < kGradFragments; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[m][i] = *reinterpret_cast<const uint32_t*>(grads + (step * 8 + i / 2 * 4 + t) * row_bytes +
                                                   4 * (m * 16 + i % 2 * 8 + g));
  const unsigned char* const left = patch + positions[step * 8 + t];
  const unsigned char* const right = patch + positions[step * 8 + 4 + t];
#pragma unroll
  for (int j = 0; j < kGradUnits; ++j) {
    const uint32_t b0 = to_tf32(*reinterpret_cast<const float*>(left + columns[j]));
    const uint32_t b1 = to_tf32(*reinterpret_cast<const float*>(right + columns[j]));
#pragma unroll
    for (int m = 0; m < kGradFragments; ++m) Math::multiply(sums[m][j], a[m], b0, b1);
  }
}

__device__ inline void multiply_float(const unsigned char* grads, int row_bytes,
                                      const unsigned char* patch, const int* positions,
                                      const int (&columns)[2][kGradUnits], int step,
                                      GradSums& sums) {
  const int g = threadIdx.x % kWarpSize / 4;
  const float* a_row = reinterpret_cast<const float*>(grads + step * row_bytes) + g;
  float a[kGradFragments][2];
#pragma unroll
  for (int m = 0; m < kGradFragments; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) a[m][h] = a_row[m * 16 + h * 8];
  const unsigned char* const at = patch + positions[step];
#pragma unroll
  for (int j = 0; j < kGradUnits; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float b = *reinterpret_cast<const float*>(at + columns[e][j]);
#pragma unroll
      for (int m = 0; m < kGradFragments; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) sums[m][j][2 * h + e] += a[m][h] * b;
    }
}

// The warp's columns as this thread reads them, and all its steps of the box.
template <typename Math, bool kGather>
struct Multiplier {
  static constexpr int kBytes = sizeof(typename Math::Element);
  static constexpr int kPositions = !Layout<Math>::kMatrixUnit ? 1 : kBytes == 2 ? 16 : 8;
  int columns[Layout<Math>::kMatrixUnit ? 1 : 2][kGradUnits];

  __device__ Multiplier(const ConvBlockShape& s, const GemmTile& t, int first_unit) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int j = 0; j < kGradUnits; ++j) {
      const int column = 8 * (first_unit + j);
      if constexpr (!Layout<Math>::kMatrixUnit) {
        for (int e = 0; e < 2; ++e)
          columns[e][j] = grad_column_offset<Math, kGather>(s, t, column + lane % 4 * 2 + e);
      } else {
        // load_matrices_transposed wants a unit's first column, the other loads one of their own.
        const int own = kGather || kBytes == 4 ? lane / 4 : 0;
        columns[0][j] = grad_column_offset<Math, kGather>(s, t, column + own);
      }
    }
  }

  __device__ void run(const GemmTile& t, const unsigned char* grads, int row_bytes,
                      const unsigned char* patch, const int* positions, int first, int stride,
                      GradSums& sums) const {
    const int steps = (static_cast<int>(t.units) + kPositions - 1) / kPositions;
#pragma unroll 1
    for (int step = first; step < steps; step += stride)
      if constexpr (!Layout<Math>::kMatrixUnit)
        multiply_float(grads, row_bytes, patch, positions, columns, step, sums);
      else if constexpr (kBytes == 2)
        multiply_halves<Math, kGather>(grads, row_bytes, patch, positions, columns[0], step, sums);
      else
        multiply_tf32<Math>(grads, row_bytes, patch, positions, columns[0], step, sums);
  }
};

// ---- adding up

// The sums of the warps that took turns, in the first of them; `room` has a place for each thread
// of warps_n warps.
__device__ inline void add_up_warps(const WeightGradPlan& p, int warp_k, int warp_n, float* room,
                                    GradSums& sums) {
  constexpr int kEach = kGradFragments * kGradUnits * 4;
  float* const own = room + warp_n * kEach * kWarpSize + threadIdx.x % kWarpSize;
  for (int turn = 1; turn < p.warps_k; ++turn) {
    __syncthreads();
    if (warp_k == turn)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        own[i * kWarpSize] = sums[i / 4 / kGradUnits][i / 4 % kGradUnits][i % 4];
    __syncthreads();
    if (warp_k == 0)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        sums[i / 4 / kGradUnits][i / 4 % kGradUnits][i % 4] += own[i * kWarpSize];
  }
  __syncthreads();
}

// The block's part of db, from the sums of all threads, kSize for each.
template <int kSize>
__device__ void store_bias_grad(const ConvBlockShape& s, int64_t k0, const float* sums, float* to,
                                int64_t elements) {
  constexpr int kVectors = kGradChannels / kSize;
  const int k = threadIdx.x;
  if (k >= kGradChannels || k0 + k >= s.K) return;
  float sum = 0;
  for (int thread = k / kSize; thread < kGradThreads; thread += kVectors)
    sum += sums[thread * kSize + k % kSize];
  to[(k0 + k) * elements + elements - 1] = sum;
}

// ---- the kernel

// Grid: x has the parts of the boxes, y the output channels, 32 at a time, and the chunks of input
// channels. `s` is map_shape of the block's own; partial [parts, K, taps x C + 1]. Shared memory:
// two patches, gradients, table of positions, room to add up.
template <typename Math, bool kGather>
__global__ void __launch_bounds__(kGradThreads, 1)
    weight_grad_kernel(ConvBlockShape s, WeightGradPlan p, InputSource<Math, kGather> source,
                       MapGrad<typename Math::Element> grad, int parts, float* partial) {
  constexpr int kSize = MapGrad<typename Math::Element>::kSize;
  const GemmTile& t = p.tile;
  if constexpr (Layout<Math>::kMatrixUnit && !FASTCLS_SM80) return trap();
  DYNAMIC_SHARED(shared);
  const int row_bytes = grad_row_bytes(p.config);
  unsigned char* const patches = shared;
  unsigned char* const grads = patches + 2 * t.patch_bytes;
  int* const positions = reinterpret_cast<int*>(grads + p.config.rows() * row_bytes);
  float* const room = reinterpret_cast<float*>(positions + p.config.rows());
  const int chunk = blockIdx.y % t.chunks;
  const int64_t k0 = static_cast<int64_t>(blockIdx.y / t.chunks) * kGradChannels;
  const int warp = threadIdx.x / kWarpSize, warp_n = warp % p.warps_n, warp_k = warp / p.warps_n;

  // 1. Where positions have their first tap in the patch. Those after the last have gradients of
  //    zero, and read the first one's pixels.
  for (int i = threadIdx.x; i < p.config.rows(); i += blockDim.x) {
    const Unit u = unit_at(t, i < t.units ? i : 0);
    positions[i] = u.image * t.image_bytes + u.y * t.step_h * t.row_bytes + u.x * t.step_bytes;
  }
  const Multiplier<Math, kGather> multiplier(s, t, warp_n * kGradUnits);

  // 2. Box by box: the next patch is on its way while gradients are expanded and multiplied.
  const int boxes = static_cast<int>(t.boxes), each = (boxes + gridDim.x - 1) / gridDim.x;
  const int first = blockIdx.x * each, last = first + each < boxes ? first + each : boxes;
  GradSums sums = {};
  for (int i = 0; i < kSize; ++i) room[threadIdx.x * kSize + i] = 0;
  const auto load = [&](int i) {
    if (i < last)
      load_patch<Math, kGather>(s, t, source, patches + (i - first) % 2 * t.patch_bytes,
                                box_at(s, t, i), chunk);
    copy_async_commit();
  };
  load(first);
  for (int i = first; i < last; ++i) {
    load(i + 1);
    for (int part = 0; part < parts; ++part) {
      expand_grads<Math>(s, t, grad, box_at(s, t, i), k0, row_bytes, grads, room, part > 0);
      copy_async_wait<1>();
      __syncthreads();
      multiplier.run(t, grads, row_bytes, patches + (i - first) % 2 * t.patch_bytes, positions,
                     warp_k, p.warps_k, sums);
      __syncthreads();
    }
  }
  copy_async_wait<0>();

  // 3. The block's part of the sums.
  const int64_t elements = weight_grad_elements(s);
  float* const to = partial + blockIdx.x * s.K * elements;
  if (chunk == 0) store_bias_grad<kSize>(s, k0, room, to, elements);
  add_up_warps(p, warp_k, warp_n, room, sums);
  if (warp_k != 0) return;
  const int g = threadIdx.x % kWarpSize / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kGradUnits; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int unit = warp_n * kGradUnits + j;
      const int64_t element = grad_element<kGather>(s, t, 8 * unit + pair + e, chunk);
      if (unit >= p.units || element < 0) continue;
#pragma unroll
      for (int m = 0; m < kGradFragments; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t k = k0 + m * 16 + h * 8 + g;
          if (k < s.K) to[k * elements + element] = sums[m][j][2 * h + e];
        }
    }
}

template <typename Math, bool kGather>
void launch_backward_weight(const Launcher& launch, const ConvBlockShape& s,
                            const WeightGradPlan& plan, const BackwardTensors& t,
                            const Tensor& partial) {
  using Element = typename Math::Element;
  const auto grad = map_grad<Element>(s, const_view<Element>(t.grad_out), t.codes);
  // The sum of two windows' half-precision gradients is no half-precision number, which a gradient
  // of float parameters would show.
  const bool wide = t.weight.scalar_type() == ScalarType::Float;
  const int parts = grad.overlap && wide && sizeof(Element) == 2 ? 2 : 1;
  launch.with_shared(plan.tile.shared_bytes, weight_grad_kernel<Math, kGather>,
                     dim3(plan.splits, plan.channel_blocks * plan.tile.chunks), kGradThreads,
                     map_shape(s), plan,
                     input_source<Math, kGather>(const_view<Element>(t.input), s.C), grad, parts,
                     static_cast<float*>(partial.mutable_data_ptr()));
}

}  // namespace

void launch_gemm_backward_weight(const Launcher& launch, const ConvBlockShape& s,
                                 const WeightGradPlan& plan, Arithmetic a,
                                 const BackwardTensors& t) {
  const Tensor partial =
      empty_flat({plan.splits, s.K, weight_grad_elements(s)}, ScalarType::Float, t.input);
  dispatch_arithmetic(a, [&](auto math) {
    if (plan.config.gather)
      launch_backward_weight<decltype(math), true>(launch, s, plan, t, partial);
    else
      launch_backward_weight<decltype(math), false>(launch, s, plan, t, partial);
  });
  launch_sum_chunks(launch, s, plan.splits, partial, t);
}

}  // namespace fastcls::cuda
