// conv_block on CUDA, general kernels: every geometry, dtype, stride and window.
//
// Fused: convolution, bias, ReLU, max-pool and the winner's code. Never written to memory: the conv
// map, its gradient and casts of the operands. Sums are in a fixed order: no atomics.
//
//   forward_kernel: a thread owns one pooled output. It convolves the positions of its window and
//     keeps the maximum.
//   backward_input_kernel: a thread owns one element of dX. It gathers from every open winner whose
//     kernel covers that element.
//   backward_weight_kernel: a block owns a tile of one channel's dW and db over a chunk of the
//     pooled rows (see WeightGradTile) and writes a partial sum.
//   sum_chunks_kernel: a column of threads owns one element of dW or db and adds up its partial
//     sums.
//
// Offsets are 64-bit throughout. Template arguments T, W and Acc as in conv_block.h.
#include "cuda/conv_block_kernels.h"

#include <limits>

namespace fastcls::cuda {

namespace {

// ---- device helpers

__device__ inline int64_t element_index() {
  return static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
}

// A place in a tensor [N, C, H, W].
struct Place {
  int64_t n, c, h, w;
};

// Element `index` of a tensor of these sizes, channels innermost or outermost. Threads that follow
// each other take elements that lie side by side in memory.
__device__ inline Place place_of(int64_t index, int64_t C, int64_t H, int64_t W,
                                 bool channels_last) {
  Place p;
  if (channels_last) p.c = index % C, index /= C;
  p.w = index % W, index /= W;
  p.h = index % H, index /= H;
  if (!channels_last) p.c = index % C, index /= C;
  p.n = index;
  return p;
}

// The conv map at (n, k, ch, cw), without bias. Taps in the padding are skipped.
template <typename T, typename W, typename Acc>
__device__ Acc conv_at(const ConvBlockShape& s, const View4<const T>& x,
                       const View4<const W>& weight, int64_t n, int64_t k, int64_t ch, int64_t cw) {
  const int64_t Cg = s.group_in(), c0 = k / s.group_out() * Cg;
  Acc sum = 0;
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    const int64_t h = ch * s.stride_h - s.pad_h + i * s.dilation_h;
    if (h < 0 || h >= s.H) continue;
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      const int64_t w = cw * s.stride_w - s.pad_w + j * s.dilation_w;
      if (w < 0 || w >= s.W) continue;
      const T* src = x.at(n, c0, h, w);
      const W* tap = weight.at(k, 0, i, j);
      for (int64_t c = 0; c < Cg; ++c)
        sum += static_cast<Acc>(src[c * x.c]) * static_cast<Acc>(tap[c * weight.c]);
    }
  }
  return sum;
}

// ---- kernels

// PyTorch's rule: the first maximum in row-major order wins, except that every NaN takes over; a
// maximum that is not > 0 (and no NaN) shuts the ReLU. Pool padding counts as -inf.
template <typename T, typename W, typename Acc>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(ConvBlockShape s, View4<const T> x, View4<const W> weight, const W* bias,
                   View4<T> out, Codes codes, bool channels_last) {
  const int64_t index = element_index();
  if (index >= s.out_numel()) return;
  const auto [n, k, ph, pw] = place_of(index, s.K, s.out_h, s.out_w, channels_last);
  const int64_t h0 = ph * s.pool_stride_h - s.pool_pad_h, w0 = pw * s.pool_stride_w - s.pool_pad_w;
  const Acc b = bias ? static_cast<Acc>(bias[k]) : Acc(0);

  Acc best = -std::numeric_limits<Acc>::infinity();
  int place = Codes::kNone;  // no position seen yet
  for (int i = 0; i < s.pool_h; ++i) {
    if (h0 + i < 0 || h0 + i >= s.conv_h) continue;
    for (int j = 0; j < s.pool_w; ++j) {
      if (w0 + j < 0 || w0 + j >= s.conv_w) continue;
      const Acc value = conv_at<T, W, Acc>(s, x, weight, n, k, h0 + i, w0 + j) + b;
      if (value > best || value != value || place == Codes::kNone)
        best = value, place = i * static_cast<int>(s.pool_w) + j;
    }
  }
  if (s.relu && best <= Acc(0)) best = Acc(0), place = Codes::kNone;
  *out.at(n, k, ph, pw) = static_cast<T>(best);
  codes.set(((n * s.out_h + ph) * s.out_w + pw) * s.K + k, place);
}

// dX[n, c, h, w] = Σ g[n, k, ph, pw] · weight[k, c, i, j] over taps (i, j), the conv-map position
// (ch, cw) that this tap joins to (h, w), the windows (ph, pw) over it, and the channels k whose
// winner there is (ch, cw).
template <typename T, typename W, typename Acc>
__global__ void __launch_bounds__(kElementThreads)
    backward_input_kernel(ConvBlockShape s, View4<const T> grad_out, View4<const W> weight,
                          Codes codes, View4<T> grad_input, bool channels_last) {
  const int64_t index = element_index();
  if (index >= s.N * s.C * s.H * s.W) return;
  const auto [n, c, h, w] = place_of(index, s.C, s.H, s.W, channels_last);
  const int64_t Cg = s.group_in(), Kg = s.group_out(), k0 = c / Cg * Kg, cg = c % Cg;

  Acc sum = 0;
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    const int64_t y = h + s.pad_h - i * s.dilation_h, ch = y / s.stride_h;
    if (y < 0 || y % s.stride_h != 0 || ch >= s.conv_h) continue;
    const Windows<int64_t> rows =
        windows_over(ch, s.pool_h, s.pool_stride_h, s.pool_pad_h, s.out_h);
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      const int64_t z = w + s.pad_w - j * s.dilation_w, cw = z / s.stride_w;
      if (z < 0 || z % s.stride_w != 0 || cw >= s.conv_w) continue;
      const Windows<int64_t> cols =
          windows_over(cw, s.pool_w, s.pool_stride_w, s.pool_pad_w, s.out_w);
      for (int64_t ph = rows.first; ph <= rows.last; ++ph)
        for (int64_t pw = cols.first; pw <= cols.last; ++pw) {
          const int64_t place = (ch - ph * s.pool_stride_h + s.pool_pad_h) * s.pool_w + cw -
                                pw * s.pool_stride_w + s.pool_pad_w;
          // Unrolled, this loop takes so many registers that half the threads fit.
          const int64_t first = ((n * s.out_h + ph) * s.out_w + pw) * s.K + k0;
#pragma unroll 1
          for (int64_t k = 0; k < Kg; ++k)
            if (codes.get(first + k) == place)
              sum += static_cast<Acc>(*grad_out.at(n, k0 + k, ph, pw)) *
                     static_cast<Acc>(*weight.at(k0 + k, cg, i, j));
        }
    }
  }
  *grad_input.at(n, c, h, w) = static_cast<T>(sum);
}

// dW[k, c, i, j] = Σ g · x[n, c, h + i - pad, w + j - pad] over the open winners (h, w) of channel
// k, and db[k] = Σ g. The sum over one pooled row is rounded apart from the total, which keeps
// float error from growing with the batch.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kElementThreads)
    backward_weight_kernel(ConvBlockShape s, WeightGradTile t, View4<const T> grad_out,
                           View4<const T> x, Codes codes, Acc* partial) {
  const int64_t k = blockIdx.x / t.tiles, tile = blockIdx.x % t.tiles, chunk = blockIdx.y;
  const int lane = threadIdx.x % t.lanes, row = threadIdx.x / t.lanes;
  const int64_t element = tile * t.lanes + lane, Cg = s.group_in();
  const bool is_bias = element == t.elements - 1;
  const int64_t c = k / s.group_out() * Cg + (is_bias ? 0 : element % Cg);
  const int64_t tap = is_bias ? 0 : element / Cg;
  const int64_t i = tap / s.kernel_w, j = tap % s.kernel_w;

  // 1. Each thread sums its element over the pooled rows of its turn.
  const int64_t first = chunk * t.rows_per_chunk;
  const int64_t last = std::min(first + t.rows_per_chunk, s.N * s.out_h);
  Acc total = 0;
  for (int64_t r = first + row; r < last && element < t.elements; r += t.rows) {
    const int64_t n = r / s.out_h, ph = r % s.out_h;
    Acc line = 0;
    for (int64_t pw = 0; pw < s.out_w; ++pw) {
      const int code = codes.get((r * s.out_w + pw) * s.K + k);
      if (code == Codes::kNone) continue;
      const Acc g = static_cast<Acc>(*grad_out.at(n, k, ph, pw));
      if (is_bias) {
        line += g;
        continue;
      }
      int64_t ch, cw;
      winner_position(s, ph, pw, code, &ch, &cw);
      const int64_t h = ch * s.stride_h - s.pad_h + i * s.dilation_h;
      const int64_t w = cw * s.stride_w - s.pad_w + j * s.dilation_w;
      if (h >= 0 && h < s.H && w >= 0 && w < s.W) line += g * static_cast<Acc>(*x.at(n, c, h, w));
    }
    total += line;
  }

  // 2. The rows of the block are added in a tree.
  SHARED_ARRAY(Acc, sums, kElementThreads);
  sums[threadIdx.x] = total;
  for (int half = t.rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) sums[threadIdx.x] += sums[threadIdx.x + half * t.lanes];
  }
  if (row == 0 && element < t.elements)
    partial[(chunk * s.K + k) * weight_grad_row(s) + element] = sums[lane];
}

// Threads [kSumRows, kWarpSize]: a warp's lanes own elements that lie side by side, its warps take
// turns at the chunks. grad_weight.data or grad_bias is null where it is not wanted.
constexpr int kSumRows = 8;

template <typename W, typename Acc>
__global__ void __launch_bounds__(kSumRows* kWarpSize)
    sum_chunks_kernel(ConvBlockShape s, int64_t chunks, const Acc* partial, View4<W> grad_weight,
                      W* grad_bias) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t elements = weight_grad_elements(s), stride = weight_grad_row(s);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane, total = s.K * stride;
  const int64_t k = index / stride, element = index % stride;
  const bool exists = index < total && element < elements;
  SHARED_ARRAY(Acc, sums, kSumRows * kWarpSize);
  Acc own = 0;
  if (exists)
#pragma unroll 8  // loads in flight
    for (int64_t chunk = warp; chunk < chunks; chunk += kSumRows)
      own += partial[chunk * total + index];
  sums[threadIdx.x] = own;
  __syncthreads();
  if (warp > 0 || !exists) return;
  Acc sum = 0;
  for (int row = 0; row < kSumRows; ++row) sum += sums[row * kWarpSize + lane];
  if (element == elements - 1) {
    if (grad_bias) grad_bias[k] = static_cast<W>(sum);
  } else if (grad_weight.data) {
    const int64_t Cg = s.group_in(), tap = element / Cg;
    *grad_weight.at(k, element % Cg, tap / s.kernel_w, tap % s.kernel_w) = static_cast<W>(sum);
  }
}

}  // namespace

// ---- launchers

void launch_general_forward(const Launcher& launch, const ConvBlockShape& s,
                            const ForwardTensors& t) {
  dispatch_types(t.input.scalar_type(), t.weight.scalar_type(), [&](auto x, auto w, auto acc) {
    using T = decltype(x);
    using W = decltype(w);
    launch(forward_kernel<T, W, decltype(acc)>, element_blocks(s.out_numel()), kElementThreads, s,
           const_view<T>(t.input), const_view<W>(t.weight),
           t.bias ? static_cast<const W*>(t.bias->const_data_ptr()) : nullptr,
           mutable_view<T>(t.out), t.codes, suggests_channels_last(t.out));
  });
}

void launch_general_backward_input(const Launcher& launch, const ConvBlockShape& s,
                                   const BackwardTensors& t) {
  dispatch_types(t.input.scalar_type(), t.weight.scalar_type(), [&](auto x, auto w, auto acc) {
    using T = decltype(x);
    launch(backward_input_kernel<T, decltype(w), decltype(acc)>,
           element_blocks(t.grad_input.numel()), kElementThreads, s, const_view<T>(t.grad_out),
           const_view<decltype(w)>(t.weight), t.codes, mutable_view<T>(t.grad_input),
           suggests_channels_last(t.grad_input));
  });
}

void launch_general_backward_weight(const Launcher& launch, const ConvBlockShape& s,
                                    const BackwardTensors& t) {
  const WeightGradTile tile = weight_grad_tile(s);
  const Tensor partial = empty_flat({tile.chunks, s.K, weight_grad_row(s)},
                                    accumulate_type(t.input.scalar_type()), t.input);
  dispatch_types(t.input.scalar_type(), t.weight.scalar_type(), [&](auto x, auto, auto acc) {
    using T = decltype(x);
    using Acc = decltype(acc);
    launch(backward_weight_kernel<T, Acc>, dim3(s.K * tile.tiles, tile.chunks), kElementThreads, s,
           tile, const_view<T>(t.grad_out), const_view<T>(t.input), t.codes,
           static_cast<Acc*>(partial.mutable_data_ptr()));
  });
  launch_sum_chunks(launch, s, tile.chunks, partial, t);
}

void launch_sum_chunks(const Launcher& launch, const ConvBlockShape& s, int64_t chunks,
                       const Tensor& partial, const BackwardTensors& t) {
  dispatch_types(t.input.scalar_type(), t.weight.scalar_type(), [&](auto, auto w, auto acc) {
    using W = decltype(w);
    using Acc = decltype(acc);
    launch(sum_chunks_kernel<W, Acc>, ceil_div(s.K * weight_grad_row(s), kWarpSize),
           kSumRows * kWarpSize, s, chunks, static_cast<const Acc*>(partial.const_data_ptr()),
           t.grad_weight.numel() ? mutable_view<W>(t.grad_weight) : View4<W>{},
           t.grad_bias.numel() ? static_cast<W*>(t.grad_bias.mutable_data_ptr()) : nullptr);
  });
}

}  // namespace fastcls::cuda
