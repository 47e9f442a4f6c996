// Outputs of a conv block from the sums of its matrix product: pool, ReLU, the winner's code, and
// stores of eight channels at a time. See conv_block_gemm.h for what a thread holds.
#pragma once

#include "cuda/conv_block_patch.h"

namespace fastcls::cuda {

// Which of a block's output channels the product's column 8 n + 2 t + e is. Those of a thread, by
// which they are stored, are 8 neighbours in 4 fragments.
__device__ inline int channel_of_column(int column) {
  const int n = column / 8, t = column % 8 / 2, e = column % 2;
  return n / 4 * 32 + 8 * t + n % 4 * 2 + e;
}

template <typename T>
struct GemmOutput {
  NarrowView<T> out;
  uint8_t* codes;  // null: none are kept
  bool vectors;    // eight neighbouring channels lie in aligned vectors
};

// The maximum of a window and where it was.
struct Best {
  float value = 0;
  int place = Codes::kNone;

  // By PyTorch's rule: the first in row-major order wins, but every NaN takes over.
  __device__ void offer(float v, int at, bool first) {
    const bool wins = first | (v > value) | (v != v);  // no branches
    value = wins ? v : value, place = wins ? at : place;
  }
  // The same of 2 x 2 positions in fewer steps, if none is NaN. If one is, so is the value.
  __device__ static Best of_square(float v0, float v1, float v2, float v3) {
    const float above = max_nan(v0, v1), below = max_nan(v2, v3);
    const int right_above = v1 > v0 ? 1 : 0, right_below = v3 > v2 ? 3 : 2;
    return {max_nan(above, below), below > above ? right_below : right_above};
  }
  __device__ void close(bool relu) {
    if (relu && value <= 0) value = 0, place = Codes::kNone;
  }
};

constexpr int kRun = 8;  // neighbouring channels of a pixel, which a thread stores in one go

// The last boxes reach beyond the tensor.
__device__ inline bool is_output(const ConvBlockShape& s, int n, int h, int w) {
  return (n < static_cast<int>(s.N)) & (h < static_cast<int>(s.out_h)) &
         (w < static_cast<int>(s.out_w));  // no branches
}

// Where the outputs of one position lie, from channel k0 on.
template <typename T>
struct OutputPixel {
  T* out;
  uint8_t* codes;
  int channels;  // that follow

  __device__ OutputPixel(const ConvBlockShape& s, const GemmOutput<T>& to, int n, int k0, int h,
                         int w)
      : out(to.out.at(n, k0, h, w)), codes(nullptr), channels(static_cast<int>(s.K) - k0) {
    const int out_h = static_cast<int>(s.out_h), out_w = static_cast<int>(s.out_w);
    const int K = static_cast<int>(s.K);
    if (to.codes)
      codes = to.codes + multiply_add_wide(n, out_h * out_w * K, (h * out_w + w) * K + k0);
  }
};

// The codes of four channels side by side: a code is a place's lowest byte.
__device__ inline unsigned packed_codes(const Best (&best)[kRun], int i) {
  static_assert(static_cast<uint8_t>(Codes::kNone) == kShut<uint8_t>);
  return __byte_perm(__byte_perm(best[i].place, best[i + 1].place, 0x0040),
                     __byte_perm(best[i + 2].place, best[i + 3].place, 0x0040), 0x5410);
}

// Channels k0 + k to k0 + k + 7 of the pixel.
template <typename T>
__device__ void store_run(const ConvBlockShape& s, const GemmOutput<T>& to,
                          const OutputPixel<T>& pixel, int k, Best (&best)[kRun]) {
#pragma unroll
  for (Best& b : best) b.close(s.relu);
  if (to.vectors) {
    constexpr int kSize = Vector<T>::kSize;
#pragma unroll
    for (int i = 0; i < kRun; i += kSize) {
      Vector<T> v;
#pragma unroll
      for (int j = 0; j < kSize; ++j) v.e[j] = static_cast<T>(best[i + j].value);
      *reinterpret_cast<Vector<T>*>(pixel.out + k + i) = v;
    }
  } else {
    T* out = pixel.out + static_cast<int64_t>(k) * to.out.c;
#pragma unroll
    for (int i = 0; i < kRun; ++i, out += to.out.c)
      if (k + i < pixel.channels) *out = static_cast<T>(best[i].value);
  }
  if (!pixel.codes) return;
  if (pixel.channels % kRun == 0) {
    *reinterpret_cast<uint2*>(pixel.codes + k) = {packed_codes(best, 0), packed_codes(best, 4)};
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (k + i < pixel.channels) pixel.codes[k + i] = static_cast<uint8_t>(best[i].place);
  }
}

// Every row is an output.
template <int kGroups, int kTilesN, typename T>
__device__ void store_outputs(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                              const Box& box, int k0,
                              const float (&sums)[2 * kGroups][kTilesN][4]) {
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
#pragma unroll
  for (int m = 0; m < 2 * kGroups; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = (warp * kGroups * 2 + m) * 16 + half * 8 + g;
      const Unit u = unit_at(t, index);
      const int n = box.n + u.image, h = box.out_h + u.y, w = box.out_w + u.x;
      if (index >= static_cast<int>(t.units) || !is_output(s, n, h, w)) continue;
      const OutputPixel<T> pixel(s, to, n, k0, h, w);
    // With pool padding the one position of a window may lie outside the map: never with a
    // window of 1 x 1, whose padding is at most half of it.
#pragma unroll
      for (int tile = 0; tile < kTilesN; tile += kRun / 2) {
        if (8 * tile >= pixel.channels) break;
        Best best[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) best[i] = {sums[m][tile + i / 2][2 * half + i % 2], 0};
        store_run(s, to, pixel, 8 * tile, best);
      }
    }
}

// Four rows of a thread are a window.
template <int kGroups, int kTilesN, typename T>
__device__ void store_windows(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                              const Box& box, int k0,
                              const float (&sums)[2 * kGroups][kTilesN][4]) {
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
  const int conv_h = static_cast<int>(s.conv_h), conv_w = static_cast<int>(s.conv_w);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int index = (warp * kGroups + group) * 8 + g;
    const Unit u = unit_at(t, index);
    const int n = box.n + u.image, h = box.out_h + u.y, w = box.out_w + u.x;
    if (index >= static_cast<int>(t.units) || !is_output(s, n, h, w)) continue;
    const OutputPixel<T> pixel(s, to, n, k0, h, w);
    const int ch = box.conv_h + u.y * static_cast<int>(s.pool_stride_h);
    const int cw = box.conv_w + u.x * static_cast<int>(s.pool_stride_w);
    const bool whole = ch >= 0 && ch + 1 < conv_h && cw >= 0 && cw + 1 < conv_w;
#pragma unroll
    for (int tile = 0; tile < kTilesN; tile += kRun / 2) {
      if (8 * tile >= pixel.channels) break;
      const auto value = [&](int i, int place) {
        return sums[2 * group + place / 2][tile + i / 2][2 * (place % 2) + i % 2];
      };
      Best best[kRun];
      bool exact = !whole;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        best[i] = Best::of_square(value(i, 0), value(i, 1), value(i, 2), value(i, 3));
        exact |= best[i].value != best[i].value;
      }
      if (exact) {
        bool first = true;
#pragma unroll
        for (int place = 0; place < 4; ++place) {
          const int y = ch + place / 2, x = cw + place % 2;
          if (y < 0 || y >= conv_h || x < 0 || x >= conv_w) continue;
#pragma unroll
          for (int i = 0; i < kRun; ++i) best[i].offer(value(i, place), place, first);
          first = false;
        }
      }
      store_run(s, to, pixel, 8 * tile, best);
    }
  }
}

// Rows are positions of the conv map; they are pooled from shared memory, `map`
// [rows, columns + 1] floats.
template <int kGroups, int kTilesN, typename T>
__device__ void store_pooled(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                             const Box& box, int column0, float* map,
                             const float (&sums)[2 * kGroups][kTilesN][4]) {
  constexpr int kColumns = 8 * kTilesN, kRow = kColumns + 1, kRuns = kColumns / kRun;
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
  if (warp * kGroups * 32 < t.units)
#pragma unroll
    for (int m = 0; m < 2 * kGroups; ++m)
#pragma unroll
      for (int tile = 0; tile < kTilesN; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          map[((warp * kGroups * 2 + m) * 16 + i / 2 * 8 + g) * kRow +
              channel_of_column(8 * tile + 2 * (threadIdx.x % 4) + i % 2)] = sums[m][tile][i];
  __syncthreads();
  const int outputs = t.images * t.box_h * t.box_w;
  for (int i = threadIdx.x; i < outputs * kRuns; i += blockDim.x) {
    const int column = i % kRuns * kRun, index = i / kRuns;
    const int y = index / t.box_w % t.box_h, x = index % t.box_w, image = index / t.box_w / t.box_h;
    const int n = box.n + image, h = box.out_h + y, w = box.out_w + x;
    if (!is_output(s, n, h, w) || column0 + column >= static_cast<int>(s.K)) continue;
    const int dy = y * static_cast<int>(s.pool_stride_h),
              dx = x * static_cast<int>(s.pool_stride_w);
    Best best[kRun];
    bool first = true;
    for (int py = 0; py < s.pool_h; ++py) {
      if (box.conv_h + dy + py < 0 || box.conv_h + dy + py >= s.conv_h) continue;
      for (int px = 0; px < s.pool_w; ++px) {
        if (box.conv_w + dx + px < 0 || box.conv_w + dx + px >= s.conv_w) continue;
        const float* row = map + ((image * t.unit_h + dy + py) * t.unit_w + dx + px) * kRow;
#pragma unroll
        for (int j = 0; j < kRun; ++j)
          best[j].offer(row[column + j], py * static_cast<int>(s.pool_w) + px, first);
        first = false;
      }
    }
    store_run(s, to, OutputPixel<T>(s, to, n, column0 + column, h, w), 0, best);
  }
}

}  // namespace fastcls::cuda
