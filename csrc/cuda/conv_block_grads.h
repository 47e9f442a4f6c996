// What the product for dW reads of a box, see conv_block_backward_weight.cu: where units and
// positions lie, and pooled gradients and codes on their way into shared memory.
#pragma once

#include "cuda/conv_block_patch.h"

namespace fastcls::cuda {

template <typename T>
constexpr int kGradRow = grad_row_bytes(sizeof(T));

// ---- where things are

// A unit of 8 columns: its tap, or with `fold` its row of the kernel, and its place among those of
// the tap.
struct GradUnit {
  int tap, piece;
};

__device__ inline GradUnit grad_unit(const WeightGradPlan& p, int unit) {
  unsigned rest = unit;
  const int last = split(rest, p.config.fold ? p.by_run_units : p.by_taps);
  return p.config.fold ? GradUnit{static_cast<int>(rest), last}
                       : GradUnit{last, static_cast<int>(rest)};
}

// Bytes from a position's first tap to the first channel of a unit; beyond the last unit to that of
// the first.
__device__ inline int unit_offset(const ConvBlockShape& s, const WeightGradPlan& p, int unit,
                                  int bytes) {
  const GradUnit u = grad_unit(p, unit < p.units ? unit : 0);
  unsigned row = u.tap;
  const int column = p.config.fold ? 0 : split(row, p.by_kernel_w);
  return static_cast<int>(row) * static_cast<int>(s.dilation_h) * p.tile.row_bytes +
         column * static_cast<int>(s.dilation_w) * p.tile.pixel_bytes + u.piece * 8 * bytes;
}

// Where the gradient of a unit's column goes in a row of taps x C elements; -1: nowhere.
__device__ inline int64_t grad_element(const ConvBlockShape& s, const WeightGradPlan& p, int unit,
                                       int column, int chunk) {
  const GradUnit u = grad_unit(p, unit);
  int tap = u.tap, channel = u.piece * 8 + column;
  if (p.config.fold) {  // channels are 4 or 8
    const int x = channel / p.tile.channels;
    if (x >= s.kernel_w) return -1;
    tap = u.tap * static_cast<int>(s.kernel_w) + x, channel -= x * p.tile.channels;
  }
  if (unit >= p.units || channel >= p.tile.channels) return -1;
  const int64_t c = static_cast<int64_t>(chunk) * p.tile.channels + channel;
  return c < s.C ? tap * s.C + c : -1;
}

// The positions of the box in the order of the sum, as bytes from the patch's start to their first
// tap. In a step, position 2 t + (0, 1, 8, 9)[j] is what thread t takes as its j-th: place 4 q + j
// of the step's window t, or where a window is one position, output 4 j + t. Beyond the last window
// and its last place lie gradients of zero, and the first one's pixels.
__device__ inline void fill_positions(const ConvBlockShape& s, const WeightGradPlan& p,
                                      int* positions) {
  const GemmTile& t = p.tile;
  const int window = static_cast<int>(s.window());
  for (int i = threadIdx.x; i < p.steps * kGradStep; i += blockDim.x) {
    const int step = i / kGradStep, k = i % kGradStep;
    const int lane = k % 8 / 2, j = k / 8 * 2 + k % 2;
    int unit = step * kGradStep + 4 * j + lane, place = 0;
    if (window > 1) {
      unsigned windows = step;
      place = split(windows, p.by_window_steps) * 4 + j;
      unit = static_cast<int>(windows) * 4 + lane;
    }
    const Unit u = unit_at(t, unit < t.units ? unit : 0);
    unsigned row = place < window ? place : 0;
    const int column = split(row, p.by_pool_w);
    const int y = u.y * t.step_h + static_cast<int>(row) * static_cast<int>(s.stride_h);
    const int x = u.x * t.step_w + column * static_cast<int>(s.stride_w);
    positions[i] = u.image * t.image_bytes + y * t.row_bytes + column_offset(t, x);
  }
}

// ---- pooled gradients and codes in shared memory, [outputs of the box, 32 channels]

template <typename T>
struct PooledGradSource {
  NarrowView<const T> g;  // pooled gradient [N, K, out_h, out_w]
  Codes codes;
  bool vectors, code_vectors;  // channels lie in aligned 16-byte vectors
  bool channels_inner;

  __device__ void load_grads(const ConvBlockShape& s, const Box& box, int k0, int outputs,
                             const OutputEntry* table, unsigned char* to) const {
    constexpr int kSize = Vector<T>::kSize, kVectors = kGradChannels / kSize;
    const int64_t origin = static_cast<int64_t>(box.n) * g.n +
                           static_cast<int64_t>(box.out_h) * g.h +
                           static_cast<int64_t>(box.out_w) * g.w;
#pragma unroll 2
    for (int i = threadIdx.x; i < outputs * kVectors; i += blockDim.x) {
      const int unit = channels_inner ? i / kVectors : i % outputs;
      const int vector = channels_inner ? i % kVectors : i / outputs;
      const OutputEntry output = table[unit];
      const int k = k0 + vector * kSize;
      const bool inside = exists(s, box, output) && k < static_cast<int>(s.K);
      const T* const from =
          g.data + (inside ? origin + output.to + static_cast<int64_t>(k) * g.c : 0);
      unsigned char* const at = to + unit * kGradRow<T> + vector * 16;
      if (vectors) {
        copy_async(at, from, !inside);
        continue;
      }
      Vector<T> v;
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        v.e[e] = inside && k + e < s.K ? from[static_cast<int64_t>(e) * g.c] : static_cast<T>(0.0f);
      *reinterpret_cast<Vector<T>*>(at) = v;
    }
  }

  // Codes of gradients that are zero do not matter.
  __device__ void load_codes(const ConvBlockShape& s, const Box& box, int k0, int outputs,
                             const OutputEntry* table, unsigned char* to) const {
    constexpr int kVectors = kGradChannels / 16;
    const uint8_t* const data = static_cast<const uint8_t*>(codes.data);
    const int64_t row = static_cast<int64_t>(box.n) * s.out_h + box.out_h;
    const int64_t origin = (row * s.out_w + box.out_w) * s.K;
#pragma unroll 2
    for (int i = threadIdx.x; i < outputs * kVectors; i += blockDim.x) {
      const int unit = i / kVectors, k = k0 + i % kVectors * 16;
      const OutputEntry output = table[unit];
      const bool inside = data && exists(s, box, output) && k < static_cast<int>(s.K);
      const int64_t from = inside ? origin + output.code + k : 0;
      unsigned char* const at = to + unit * kGradCodeBytes + i % kVectors * 16;
      if (code_vectors) {
        copy_async(at, data + from, !inside);
        continue;
      }
      for (int e = 0; e < 16; ++e) at[e] = inside && k + e < s.K ? data[from + e] : 0;
    }
  }

 private:
  __device__ static bool exists(const ConvBlockShape& s, const Box& box,
                                const OutputEntry& output) {
    return output.image >= 0 && box.n + output.image < static_cast<int>(s.N) &&
           box.out_h + output.y() < static_cast<int>(s.out_h) &&
           box.out_w + output.x() < static_cast<int>(s.out_w);
  }
};

template <typename T>
PooledGradSource<T> pooled_grad_source(const ConvBlockShape& s, const View4<const T>& g,
                                       const Codes& codes) {
  const bool aligned = s.K % 16 == 0 && reinterpret_cast<uintptr_t>(codes.data) % 16 == 0;
  return {narrowed(g), codes, channels_are_vectors(g, s.K), codes.data && aligned, g.c <= g.w};
}

}  // namespace fastcls::cuda
