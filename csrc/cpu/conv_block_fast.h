// The fast conv-block kernels as the host code sees them: one table per instruction set.
#pragma once

#include <cstdint>

#include "cpu/conv_block_general.h"
#include "shapes.h"

namespace fastcls::cpu {

// Weights [K, C, kernel_h, kernel_w] whose channels and taps lie together: element (k, c, t) at
// data[k · C · taps + c · channel + t · tap].
struct DenseWeight {
  const float* data;
  int64_t channel, tap;
};

// The forward pass of an image goes by `bands` of `rows` pooled rows and, where there would be too
// few of them for the threads, each band by `shares` of the output channels.
struct ForwardUnits {
  int64_t rows, bands, shares;
};

// Number of zeros that follow the bias: up to a whole vector of AVX-512, the longest.
constexpr int64_t kBiasPadding = 15;

// Brings weights into the order in which a pass reads them: so many floats, in blocks of output
// channels that any thread may pack.
struct WeightPacker {
  int64_t (*floats)(const ConvBlockShape& s);
  int64_t (*blocks)(const ConvBlockShape& s);
  void (*pack)(const ConvBlockShape& s, const DenseWeight& weight, int64_t block, float* packed);
};

// Kernels for input and output dtype T. All of them work on one range of units; units are
// independent, so that any thread may run any of them.
template <typename T>
struct ConvBlockKernels {
  // Does the forward pass go by Winograd's algorithm?
  bool (*winograd_serves)(const ConvBlockShape& s);
  WeightPacker forward_weight, input_weight;
  // Unit: a share of a band. bias: [K] and zeros, never null; packed: by forward_weight
  void (*forward)(const ConvBlockShape& s, const View4<const T>& x, const float* packed,
                  const float* bias, const View4<T>& out, uint8_t* winner,
                  const ForwardUnits& units, int64_t begin, int64_t end);
  // Unit: a chunk of `chunk` images. Writes partial [units, K, kernel_h · kernel_w · C + 1], whose
  // last column is the bias gradient.
  void (*backward_weight)(const ConvBlockShape& s, const View4<const T>& grad_out,
                          const View4<const T>& x, const uint8_t* winner, float* partial,
                          int64_t chunk, int64_t begin, int64_t end);
  // Unit: one image. packed: by input_weight
  void (*backward_input)(const ConvBlockShape& s, const View4<const T>& grad_out,
                         const float* packed, const uint8_t* winner, const View4<T>& grad_input,
                         int64_t begin, int64_t end);
};

// What the fast kernels need: one group, a window whose places fit a few compares, offsets within
// a band that are exact in float32.
inline bool fast_path_serves(const ConvBlockShape& s) {
  return s.groups == 1 && s.window() <= 16 && s.C > 0 &&
         (s.H + 2 * s.pad_h) * (s.W + 2 * s.pad_w) * s.C < (int64_t{1} << 24);
}

// Pooled rows in a band: as many as keep the packed input within 256 KiB, half of a small
// second-level cache; but so many that at most a quarter of what they read is read again by the
// next band, and an even number, for tiles of two rows.
inline int64_t band_rows(const ConvBlockShape& s) {
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * static_cast<int64_t>(sizeof(float));
  const int64_t step = s.pool_stride_h * s.stride_h, again = (s.kernel_h - 1) * s.dilation_h;
  const int64_t most = std::max((262144 / row - again) / step, (4 * again + step - 1) / step);
  return std::clamp<int64_t>(most / 2 * 2, 1, s.out_h);
}

namespace avx2 {
template <typename T>
ConvBlockKernels<T> conv_block_kernels();
}
namespace avx512 {
template <typename T>
ConvBlockKernels<T> conv_block_kernels();
}
namespace avx512_bf16 {  // bfloat16's alone
template <typename T>
ConvBlockKernels<T> conv_block_kernels();
}

}  // namespace fastcls::cpu
