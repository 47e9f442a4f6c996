// Outputs of a conv block from the sums of its matrix product: pool, ReLU, the winner's code, and
// stores of a run of channels at a time. See conv_block_gemm.h for what a thread holds.
#pragma once

#include "cuda/conv_block_patch.h"

namespace fastcls::cuda {

// Neighbouring channels of a pixel that a thread has, and stores in one go.
template <int kTilesN>
constexpr int kRun = kTilesN < 4 ? 4 : 8;

// Which of a block's output channels the product's column 8 n + 2 t + e is: those of a thread in
// kRun / 2 fragments are neighbours.
template <int kTilesN>
__device__ int channel_of_column(int column) {
  constexpr int kFragments = kRun<kTilesN> / 2;
  const int n = column / 8, t = column % 8 / 2, e = column % 2;
  return (n / kFragments * 4 + t) * kRun<kTilesN> + n % kFragments * 2 + e;
}

template <typename T>
struct GemmOutput {
  NarrowView<T> out;
  uint8_t* codes;  // null: none are kept
  bool vectors;    // a thread's channels lie in aligned vectors
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

// Where a box's outputs lie, from channel k0 on, and how many there are: the last boxes reach
// beyond the tensor.
template <typename T>
struct BoxOutputs {
  T* out;
  uint8_t* codes;
  int channels, images, height, width;

  __device__ BoxOutputs(const ConvBlockShape& s, const GemmOutput<T>& to, const Box& box, int k0)
      : out(to.out.at(box.n, k0, box.out_h, box.out_w)),
        codes(nullptr),
        channels(static_cast<int>(s.K) - k0),
        images(static_cast<int>(s.N) - box.n),
        height(static_cast<int>(s.out_h) - box.out_h),
        width(static_cast<int>(s.out_w) - box.out_w) {
    const int out_h = static_cast<int>(s.out_h), out_w = static_cast<int>(s.out_w);
    const int K = static_cast<int>(s.K);
    if (to.codes)
      codes = to.codes +
              multiply_add_wide(box.n, out_h * out_w * K, (box.out_h * out_w + box.out_w) * K + k0);
  }

  __device__ bool have(const OutputEntry& o) const {
    return (o.image < images) & (o.y() < height) & (o.x() < width);  // no branches
  }
};

// The codes of four channels side by side: a code is a place's lowest byte.
__device__ inline unsigned packed_codes(const Best* best) {
  static_assert(static_cast<uint8_t>(Codes::kNone) == kShut<uint8_t>);
  return __byte_perm(__byte_perm(best[0].place, best[1].place, 0x0040),
                     __byte_perm(best[2].place, best[3].place, 0x0040), 0x5410);
}

// The run of an output from the box's channel k on.
template <int kChannels, typename T>
__device__ void store_run(const ConvBlockShape& s, const GemmOutput<T>& to,
                          const BoxOutputs<T>& box, const OutputEntry& output, int k,
                          Best (&best)[kChannels]) {
#pragma unroll
  for (Best& b : best) b.close(s.relu);
  T* out = box.out + output.to;
  if (to.vectors) {
    constexpr int kSize = kChannels * sizeof(T) > 16 ? 16 / sizeof(T) : kChannels;
#pragma unroll
    for (int i = 0; i < kChannels; i += kSize) {
      Vector<T, kSize> v;
#pragma unroll
      for (int j = 0; j < kSize; ++j) v.e[j] = static_cast<T>(best[i + j].value);
      *reinterpret_cast<Vector<T, kSize>*>(out + k + i) = v;
    }
  } else {
    out += static_cast<int64_t>(k) * to.out.c;
#pragma unroll
    for (int i = 0; i < kChannels; ++i, out += to.out.c)
      if (k + i < box.channels) *out = static_cast<T>(best[i].value);
  }
  if (!box.codes) return;
  uint8_t* const codes = box.codes + output.code + k;
  if (box.channels % kChannels == 0) {
    if constexpr (kChannels == 8)
      *reinterpret_cast<uint2*>(codes) = {packed_codes(best), packed_codes(best + 4)};
    else
      *reinterpret_cast<unsigned*>(codes) = packed_codes(best);
  } else {
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (k + i < box.channels) codes[i] = static_cast<uint8_t>(best[i].place);
  }
}

// Every row is an output.
template <int kGroups, int kTilesN, typename T>
__device__ void store_outputs(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                              const BoxOutputs<T>& outputs, const OutputEntry* table,
                              const float (&sums)[2 * kGroups][kTilesN][4]) {
  constexpr int kChannels = kRun<kTilesN>;
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
#pragma unroll
  for (int m = 0; m < 2 * kGroups; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = (warp * kGroups * 2 + m) * 16 + half * 8 + g;
      if (index >= t.outputs) continue;
      const OutputEntry output = table[index];
      if (!outputs.have(output)) continue;
    // With pool padding the one position of a window may lie outside the map: never with a
    // window of 1 x 1, whose padding is at most half of it.
#pragma unroll
      for (int tile = 0; tile < kTilesN; tile += kChannels / 2) {
        if (8 * tile >= outputs.channels) break;
        Best best[kChannels];
#pragma unroll
        for (int i = 0; i < kChannels; ++i) best[i] = {sums[m][tile + i / 2][2 * half + i % 2], 0};
        store_run(s, to, outputs, output, 8 * tile, best);
      }
    }
}

// Are all windows whole, or do some reach beyond the conv map?
__device__ inline bool windows_are_whole(const ConvBlockShape& s) {
  return (s.pool_pad_h == 0) & (s.pool_pad_w == 0) &
         ((s.out_h - 1) * s.pool_stride_h + s.pool_h <= s.conv_h) &
         ((s.out_w - 1) * s.pool_stride_w + s.pool_w <= s.conv_w);
}

// Four rows of a thread are a window.
template <int kGroups, int kTilesN, typename T>
__device__ void store_windows(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                              const Box& box, const BoxOutputs<T>& outputs,
                              const OutputEntry* table,
                              const float (&sums)[2 * kGroups][kTilesN][4]) {
  constexpr int kChannels = kRun<kTilesN>;
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
  const int conv_h = static_cast<int>(s.conv_h), conv_w = static_cast<int>(s.conv_w);
  const bool all_whole = windows_are_whole(s);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int index = (warp * kGroups + group) * 8 + g;
    if (index >= t.outputs) continue;
    const OutputEntry output = table[index];
    if (!outputs.have(output)) continue;
    const int ch = box.conv_h + output.y() * static_cast<int>(s.pool_stride_h);
    const int cw = box.conv_w + output.x() * static_cast<int>(s.pool_stride_w);
    const bool whole = all_whole || (ch >= 0 && ch + 1 < conv_h && cw >= 0 && cw + 1 < conv_w);
#pragma unroll
    for (int tile = 0; tile < kTilesN; tile += kChannels / 2) {
      if (8 * tile >= outputs.channels) break;
      const auto value = [&](int i, int place) {
        return sums[2 * group + place / 2][tile + i / 2][2 * (place % 2) + i % 2];
      };
      Best best[kChannels];
      bool exact = !whole;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
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
          for (int i = 0; i < kChannels; ++i) best[i].offer(value(i, place), place, first);
          first = false;
        }
      }
      store_run(s, to, outputs, output, 8 * tile, best);
    }
  }
}

// Rows are positions of the conv map; they are pooled from shared memory, up to kMapColumns at a
// time: `map` [rows, columns + 1] floats.
template <int kGroups, int kTilesN, typename T>
__device__ void store_pooled(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                             const Box& box, const BoxOutputs<T>& outputs, const OutputEntry* table,
                             float* map, const float (&sums)[2 * kGroups][kTilesN][4]) {
  constexpr int kTiles = kTilesN < kMapColumns / 8 ? kTilesN : kMapColumns / 8;
  constexpr int kRow = 8 * kTiles + 1, kChannels = kRun<kTilesN>, kRuns = 8 * kTiles / kChannels;
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
#pragma unroll
  for (int tile0 = 0; tile0 < kTilesN; tile0 += kTiles) {
    __syncthreads();  // nobody reads what the map is written over
    if (warp * kGroups * 32 < t.units)
#pragma unroll
      for (int m = 0; m < 2 * kGroups; ++m)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            map[((warp * kGroups * 2 + m) * 16 + i / 2 * 8 + g) * kRow +
                channel_of_column<kTilesN>(8 * tile + 2 * (threadIdx.x % 4) + i % 2)] =
                sums[m][tile0 + tile][i];
    __syncthreads();
    for (int i = threadIdx.x; i < t.outputs * kRuns; i += blockDim.x) {
      const int column = i % kRuns * kChannels;
      const OutputEntry output = table[i / kRuns];
      if (!outputs.have(output) || 8 * tile0 + column >= outputs.channels) continue;
      const int dy = output.y() * static_cast<int>(s.pool_stride_h),
                dx = output.x() * static_cast<int>(s.pool_stride_w);
      Best best[kChannels];
      bool first = true;
      for (int py = 0; py < s.pool_h; ++py) {
        if (box.conv_h + dy + py < 0 || box.conv_h + dy + py >= s.conv_h) continue;
        for (int px = 0; px < s.pool_w; ++px) {
          if (box.conv_w + dx + px < 0 || box.conv_w + dx + px >= s.conv_w) continue;
          const float* row =
              map + ((output.image * t.unit_h + dy + py) * t.unit_w + dx + px) * kRow + column;
#pragma unroll
          for (int j = 0; j < kChannels; ++j)
            best[j].offer(row[j], py * static_cast<int>(s.pool_w) + px, first);
          first = false;
        }
      }
      store_run(s, to, outputs, output, 8 * tile0 + column, best);
    }
  }
}

}  // namespace fastcls::cuda
