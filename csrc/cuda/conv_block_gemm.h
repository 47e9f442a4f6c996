// A conv block as a matrix product whose operands are never written to memory, on the matrix unit
// or with float multiply-adds. Serves the forward pass (conv_block_forward.cu) and, as the
// convolution of the gradient with the mirrored weight, dX (conv_block_backward_input.cu).
//
//   rows: positions of the conv map     columns: output channels     sum: taps x input channels
//
// A block owns `columns` output channels, whose weights stay in shared memory, and goes from box to
// box of the outputs (GemmTile). Of the input only the patch under a box is loaded, once for all
// taps, while the box before is multiplied. Where a row finds its operand for a tap is an address:
// its own place in the patch plus the tap's. A thread holds the sums of one column's 2 x 2 window,
// so that bias, ReLU, pool and winner happen in registers.
//
// A warp has kGroups x 32 rows and kTilesN x 8 columns. Its thread 4 g + t holds the sums of
// fragment (m, n), sums[m][n][2 h + e], of row 16 m + 8 h + g and column 8 n + 2 t + e: the layout
// of the matrix unit, kept by the float kernels too.
#pragma once

#include <type_traits>

#include "cuda/conv_block_patch.h"
#include "cuda/conv_block_store.h"

namespace fastcls::cuda {

// ---- weights

// Weight or bias: float, or of the input's type.
struct GemmValues {
  const void* data;
  bool wide;  // float, whatever the input is

  template <typename T>
  __device__ float at(int64_t offset) const {
    return wide ? static_cast<const float*>(data)[offset]
                : static_cast<float>(static_cast<const T*>(data)[offset]);
  }
};

// The weight seen as [columns, channels, kernel_h, kernel_w], with its strides.
struct GemmWeight {
  GemmValues values;
  int64_t column, channel, tap_h, tap_w;
};

// The weights as shared memory has them, `to` [column blocks, chunks, rows, row bytes]: rows are
// [taps, columns]; zeros where there is nothing. One thread per element.
template <typename Math, int kTilesN, bool kFold>
__global__ void __launch_bounds__(kElementThreads)
    pack_weights_kernel(ConvBlockShape s, GemmTile t, GemmWeight weight, typename Math::Element* to,
                        int64_t elements) {
  using Element = typename Math::Element;
  constexpr int kColumns = 8 * kTilesN, kBytes = sizeof(Element);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i >= elements) return;
  const int depth = t.weight_row_bytes / kBytes, block_rows = t.weight_bytes / t.weight_row_bytes;
  const int at = static_cast<int>(i % depth), row = static_cast<int>(i / depth % block_rows);
  const unsigned block = static_cast<unsigned>(i / depth / block_rows), chunks = t.chunks;
  const int64_t k =
      static_cast<int64_t>(block / chunks) * kColumns + channel_of_column<kTilesN>(row % kColumns);
  const int tap = row / kColumns, kernel_w = static_cast<int>(s.kernel_w);
  const int y = kFold ? tap : tap / kernel_w, x = kFold ? at / t.channels : tap % kernel_w;
  const int channel = kFold ? at % t.channels : at;
  const int64_t c = static_cast<int64_t>(block % chunks) * t.channels + channel;
  float value = 0;
  if (k < s.K && c < s.C && channel < t.channels && x < kernel_w)
    value = weight.values.at<Element>(k * weight.column + c * weight.channel + y * weight.tap_h +
                                      x * weight.tap_w);
  to[i] = Math::rounded(value);
}

// The block's weights for a chunk of channels.
__device__ inline void load_weights(const GemmTile& t, const unsigned char* packed,
                                    unsigned char* to, int chunk) {
  const unsigned char* from =
      packed + (static_cast<int64_t>(blockIdx.y) * t.chunks + chunk) * t.weight_bytes;
  const int bytes = static_cast<int>(t.weight_bytes);
#pragma unroll 4
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    copy_async(to + i, from + i, false);
}

// ---- multiplying

// `bias` is that of the thread's first channel: see channel_of_column.
template <int kM, int kTilesN>
__device__ void start_sums(const float* bias, float (&sums)[kM][kTilesN][4]) {
#pragma unroll
  for (int n = 0; n < kTilesN; n += 2) {
    const auto four = *reinterpret_cast<const Vector<float>*>(bias + n / 4 * 32 + n % 4 * 2);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int m = 0; m < kM; ++m) sums[m][n + i / 4][i % 4] = four.e[i / 4 * 2 + i % 2];
  }
}

// Where a thread's parts of fragments lie: rows from the patch's start on, columns from that of the
// weights. load_matrices wants of lane i row i % 8 of the lower or upper 8 rows, the left or right
// 16 bytes.
template <int kM>
struct Places {
  int rows[kM], columns, tap_offsets;
};

template <int kM>
__device__ Places<kM> places_of(const GemmTile& t, const int* row_offsets) {
  const int lane = threadIdx.x % kWarpSize, half = lane / 8 % 2, piece = lane / 16;
  Places<kM> places;
#pragma unroll
  for (int m = 0; m < kM; ++m)
    places.rows[m] = piece * 16 + row_offsets[(row_warp() * kM + m) * 16 + half * 8 + lane % 8];
  places.columns = (piece * 8 + lane % 8) * t.weight_row_bytes + half * 16;
  places.tap_offsets = half * t.taps;
  return places;
}

// Steps of a tap whose loads and products overlap: as many as there are registers for on every
// architecture from 8.0 on. A folded patch leaves 80 to a thread: see gemm_blocks.
template <typename Math, int kTilesN, bool kFold>
constexpr int unrolled_steps(int steps) {
  if (!FASTCLS_SM80) return 1;
  if (kTilesN == 2) return steps;
  return Layout<Math>::kConfig.splits || (kTilesN == 4 && kFold) ? 1 : 2;
}

// sums += patch · weights over all taps, on the matrix unit. A step of the sum is 32 bytes of
// channels; kSteps of a tap are known, or 0.
template <typename Math, int kTilesN, bool kFold, int kSteps>
__device__ void multiply_taps(const GemmTile& t, const unsigned char* patch,
                              const unsigned char* weights, const int* table,
                              const Places<2 * Layout<Math>::kGroups>& places,
                              float (&sums)[2 * Layout<Math>::kGroups][kTilesN][4]) {
  constexpr int kM = 2 * Layout<Math>::kGroups,
                kUnrolled = kSteps < 2 ? 1 : unrolled_steps<Math, kTilesN, kFold>(kSteps);
  const int lane = threadIdx.x % kWarpSize;
  const int* const tap_offsets = table + places.tap_offsets;
  // One of two ways to add up the same: with 64 columns or without, the one that takes a register
  // less.
  const SharedAddress from = shared_address(patch);
  SharedAddress rows[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) rows[m] = from + places.rows[m];
  SharedAddress b_row = shared_address(weights) + places.columns;
  const int pair_bytes = 16 * t.weight_row_bytes, steps = kSteps ? kSteps : t.depth_bytes / 32;
  // Beyond a run's end lie other pixels, whose NaN no weight of zero makes harmless.
  const bool cut_left = kFold && t.run_words > 0 && lane % 4 >= t.run_words;
  const bool cut_right = kFold && t.run_words > 0 && lane % 4 + 4 >= t.run_words;
  int next = tap_offsets[0];
#pragma unroll 1
  for (int tap = 0; tap < t.taps; ++tap, b_row += kTilesN / 2 * pair_bytes) {
    const int offset = next;
    const SharedAddress tap_from = from + offset;
    next = tap_offsets[tap + 1 < t.taps ? tap + 1 : tap];  // early: all else waits for it
#pragma unroll kUnrolled
    for (int step = 0; step < steps; ++step) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_matrices(a[m],
                      (kTilesN > 4 ? rows[m] + offset : tap_from + places.rows[m]) + step * 32);
        if (kFold && step == steps - 1) {
          if (cut_left) a[m][0] = a[m][1] = 0;
          if (cut_right) a[m][2] = a[m][3] = 0;
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_row + n / 2 * pair_bytes + step * 32);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          Math::multiply(sums[m][n], a[m], b[0], b[1]);
          Math::multiply(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

template <typename Math, int kTilesN, bool kFold>
__device__ void multiply_matrices(const GemmTile& t, const unsigned char* patch,
                                  const unsigned char* weights, const int* table,
                                  const Places<2 * Layout<Math>::kGroups>& places,
                                  float (&sums)[2 * Layout<Math>::kGroups][kTilesN][4]) {
  // Runs of 3 to 11 pixels, or whole pixels of up to 64 half-precision channels.
  constexpr int kMany = kFold ? 3 : 4;
  switch (t.depth_bytes) {
    case 32:
      return multiply_taps<Math, kTilesN, kFold, 1>(t, patch, weights, table, places, sums);
    case 64:
      return multiply_taps<Math, kTilesN, kFold, 2>(t, patch, weights, table, places, sums);
    case 32 * kMany:
      return multiply_taps<Math, kTilesN, kFold, kMany>(t, patch, weights, table, places, sums);
    default:
      return multiply_taps<Math, kTilesN, kFold, 0>(t, patch, weights, table, places, sums);
  }
}

// sums += products of rows and a tap's weights, with multiply-adds.
template <int kM, int kTilesN>
__device__ void multiply_tap(const GemmTile& t, const unsigned char* left,
                             const unsigned char* right, const int (&rows)[kM][2],
                             const unsigned char* b_row, float (&sums)[kM][kTilesN][4]) {
  for (int depth = 0; depth < t.depth_bytes; depth += 16) {
    Vector<float> a[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        a[m][h] = *reinterpret_cast<const Vector<float>*>((h ? right : left) + rows[m][h] + depth);
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto b = *reinterpret_cast<const Vector<float>*>(
            b_row + (8 * n + e) * t.weight_row_bytes + depth);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) sums[m][n][2 * h + e] += a[m][h].e[i] * b.e[i];
      }
  }
}

// multiply_matrices with multiply-adds. A step of the sum is 4 floats, at most a pixel: no run's
// end is cut. A tap of many channels is summed up on its own: with each product the error grows by
// the last bit of the sum that it is added to.
template <typename Math, int kTilesN, bool kFold>
__device__ void multiply_floats(const GemmTile& t, const unsigned char* patch,
                                const unsigned char* weights, const int* table,
                                const int* row_offsets,
                                float (&sums)[2 * Layout<Math>::kGroups][kTilesN][4]) {
  constexpr int kM = 2 * Layout<Math>::kGroups;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4;
  int rows[kM][2];
  for (int m = 0; m < kM; ++m)
    for (int h = 0; h < 2; ++h) rows[m][h] = row_offsets[((row_warp() * kM + m) * 2 + h) * 8 + g];
  const unsigned char* b_row = weights + 2 * (lane % 4) * t.weight_row_bytes;

  const int tap_bytes = 8 * kTilesN * t.weight_row_bytes;
  for (int tap = 0; tap < t.taps; ++tap, b_row += tap_bytes) {
    const unsigned char *left = patch + table[tap], *right = patch + table[t.taps + tap];
    if constexpr (kFold) {
      multiply_tap(t, left, right, rows, b_row, sums);
    } else {
      float tap_sums[kM][kTilesN][4] = {};
      multiply_tap(t, left, right, rows, b_row, tap_sums);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kTilesN; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n][i] += tap_sums[m][n][i];
    }
  }
}

// ---- the kernel

// Blocks that shall fit on a multiprocessor side by side: a folded patch leaves shared memory for a
// third one, but before 8.0.
template <typename Math, int kTilesN, bool kFold>
constexpr int gemm_blocks() {
  return FASTCLS_SM80 && kFold && kTilesN <= 4 && sizeof(typename Math::Element) == 2 ? 3 : 2;
}

// Grid: x shares out the boxes, y the output channels. Shared memory: weights, two patches, the map
// to pool, bias, tables of taps, rows, the box's outputs and, for the input, the patch's pixels.
template <typename Math, int kTilesN, bool kFold, typename Source>
__global__ void __launch_bounds__(Layout<Math>::kThreads, gemm_blocks<Math, kTilesN, kFold>())
    gemm_kernel(ConvBlockShape s, GemmTile t, Source source, const unsigned char* packed,
                GemmValues bias, GemmOutput<typename Math::Element> to) {
  constexpr int kColumns = 8 * kTilesN, kM = 2 * Layout<Math>::kGroups;
  if constexpr (!Layout<Math>::kRuns) return trap();
  if constexpr (Source::kRounded) to.codes = nullptr;  // dX has none
  DYNAMIC_SHARED(shared);
  unsigned char* const weights = shared;
  unsigned char* const patches = weights + t.weight_bytes;
  float* const first = reinterpret_cast<float*>(patches + 2 * t.patch_bytes + t.map_bytes);
  constexpr int kRows = Layout<Math>::kConfig.rows();
  int* const row_offsets = reinterpret_cast<int*>(first + kColumns);
  int* const table = row_offsets + kRows;
  PatchEntry* const pixels =
      reinterpret_cast<PatchEntry*>(shared + static_cast<int>(t.shared_bytes)) - t.table_pixels;
  OutputEntry* const outputs = reinterpret_cast<OutputEntry*>(pixels) - t.outputs;
  const int column0 = blockIdx.y * kColumns;

  // 1. What stays the same for all boxes.
  fill_table<kFold>(s, t, table);
  for (int row = threadIdx.x; row < kRows; row += blockDim.x)
    row_offsets[row] = row_offset<kFold>(s, t, row);
  fill_outputs(s, t, to.out, t.outputs, outputs);
  if constexpr (!Source::kRounded) source.fill_table(t, pixels);
  for (int k = threadIdx.x; k < kColumns; k += blockDim.x)
    first[k] = bias.data && column0 + k < s.K ? bias.at<typename Math::Element>(column0 + k) : 0.0f;
  __syncthreads();
  // Beside more sums no registers are left for what stays the same.
  constexpr bool kKeepPlaces = kTilesN <= 2;
  Places<kM> places{};
  if (kKeepPlaces) places = places_of<kM>(t, row_offsets);

  // 2. While one patch is multiplied the next is loaded; the first is only loaded: the code for it
  // is long, and is there once. Weights of several chunks are loaded anew; a single chunk's stay.
  const int boxes = static_cast<int>(t.boxes);
  int box_index = blockIdx.x, chunk = -1, slot = 1;  // nothing to multiply yet
  float sums[kM][kTilesN][4];
#pragma unroll 1
  while (true) {
    const bool first_stage = box_index == static_cast<int>(blockIdx.x) && chunk == 0;
    copy_async_wait<0>();
    __syncthreads();  // the patch is there, and all that was read before it is free
    if (chunk < 0 || (t.chunks > 1 && !first_stage))
      load_weights(t, packed, weights, chunk < 0 ? 0 : chunk);
    copy_async_commit();
    const bool last_chunk = chunk == t.chunks - 1;
    const int next_index = box_index + (last_chunk ? static_cast<int>(gridDim.x) : 0);
    const int next_chunk = last_chunk ? 0 : chunk + 1;
    if (next_index < boxes) {
      const Box box = box_at(s, t, next_index);
      unsigned char* const next = patches + (slot ^ 1) * t.patch_bytes;
      if constexpr (Source::kRounded)  // a gradient is expanded, window by window
        source.load_patch(s, t, next, box, next_chunk);
      else if constexpr (kFold)
        source.template load_folded<false>(s, t, pixels, next, box);
      else
        source.load_patch(s, t, pixels, next, box, next_chunk);
    }
    copy_async_commit();
    if (chunk >= 0) {
      unsigned char* const patch = patches + slot * t.patch_bytes;
      constexpr bool kRound = Math::kArithmetic == Arithmetic::kTf32 && !Source::kRounded && !kFold;
      if constexpr (kRound) round_patch<Math>(patch, t.patch_bytes);
      if (t.chunks > 1) copy_async_wait<1>();
      if (kRound || t.chunks > 1) __syncthreads();

      // 3. Bias is the sums' first value, so that windows are compared as PyTorch compares them.
      constexpr int kChannels = kRun<kTilesN>;
      const int k0 = kChannels * static_cast<int>(threadIdx.x % 4);
      if (kFold || chunk == 0) start_sums(first + k0, sums);
      const int rows_used = static_cast<int>(t.units) * (t.pooling == Pooling::kWindow ? 4 : 1);
      if (row_warp() * Layout<Math>::kGroups * 32 < rows_used) {
        if constexpr (!Layout<Math>::kMatrixUnit) {
          multiply_floats<Math, kTilesN, kFold>(t, patch, weights, table, row_offsets, sums);
        } else {
          multiply_matrices<Math, kTilesN, kFold>(
              t, patch, weights, table, kKeepPlaces ? places : places_of<kM>(t, row_offsets), sums);
        }
      }

      // 4. The outputs of the box.
      if (kFold || last_chunk) {
        constexpr int kGroups = Layout<Math>::kGroups;
        const Box box = box_at(s, t, box_index);
        if (Source::kRounded || t.pooling == Pooling::kNone) {  // dX has no pool
          const BoxOutputs<typename Math::Element> to_box(s, to, box, column0 + k0);
          store_outputs<kGroups, kTilesN>(s, t, to, to_box, outputs, sums);
        } else if ((kTilesN > 4 && !kFold) || t.pooling == Pooling::kWindow) {
          const BoxOutputs<typename Math::Element> to_box(s, to, box, column0 + k0);
          store_windows<kGroups, kTilesN>(s, t, to, box, to_box, outputs, sums);
        } else {
          float* const map =
              reinterpret_cast<float*>(t.map_bytes ? patches + 2 * t.patch_bytes : patch);
          const BoxOutputs<typename Math::Element> to_box(s, to, box, column0);
          store_pooled<kGroups, kTilesN>(s, t, to, box, to_box, outputs, map, sums);
        }
      }
    }
    if (next_index >= boxes) break;
    box_index = next_index, chunk = next_chunk, slot ^= 1;
  }
  copy_async_wait<0>();
}

// ---- launching

// Calls f(std::integral_constant of kTilesN) for this number of columns: see gemm_plan.
template <typename Math, typename F>
void dispatch_columns(int columns, const F& f) {
  if (columns == 16) return f(std::integral_constant<int, 2>{});
  if constexpr (Layout<Math>::kConfig.has_wide_blocks())
    if (columns == 64) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, 4>{});
}

// Packs the weights, then persistent blocks: as many as a multiprocessor has room for. The packed
// weights lie where `like` does.
template <typename Math, int kTilesN, bool kFold, typename Source>
void launch_gemm(const Launcher& launch, const ConvBlockShape& s, const GemmTile& t,
                 const Source& source, const GemmWeight& weight, const void* bias,
                 const GemmOutput<typename Math::Element>& to, const Tensor& like) {
  using Element = typename Math::Element;
  const int64_t columns = ceil_div(s.K, 8 * kTilesN);
  const Tensor packed = empty_flat({columns * t.chunks * t.weight_bytes}, ScalarType::Byte, like);
  const int64_t elements = packed.numel() / static_cast<int64_t>(sizeof(Element));
  launch(pack_weights_kernel<Math, kTilesN, kFold>, dim3(element_blocks(elements)), kElementThreads,
         s, t, weight, static_cast<Element*>(packed.mutable_data_ptr()), elements);

  const int64_t room = blocks_with(t.shared_bytes, launch.max_shared_bytes());
  const int64_t blocks = std::clamp<int64_t>(room, 1, gemm_blocks<Math, kTilesN, kFold>());
  const int64_t at_once = std::max<int64_t>(blocks * launch.multiprocessors() / columns, 1);
  const int64_t turns = ceil_div(t.boxes, at_once);
  launch.with_shared(t.shared_bytes, gemm_kernel<Math, kTilesN, kFold, Source>,
                     dim3(ceil_div(t.boxes, turns), columns), Layout<Math>::kThreads, s, t, source,
                     static_cast<const unsigned char*>(packed.const_data_ptr()),
                     GemmValues{bias, weight.values.wide}, to);
}

template <int kTilesN, typename T>
GemmOutput<T> gemm_output(const Tensor& out, const Codes& codes, int64_t channels) {
  constexpr int64_t kChannels = kRun<kTilesN>, kVector = Vector<T>::kSize;
  const auto view = mutable_view<T>(out);
  return {narrowed(view), static_cast<uint8_t*>(codes.data),
          channels % kChannels == 0 &&
              channels_are_vectors(view, channels, std::min(kChannels, kVector))};
}

}  // namespace fastcls::cuda
