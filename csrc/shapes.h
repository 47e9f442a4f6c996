// Sizes of a conv block, as plain integers: the only place where output sizes are computed.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>

namespace fastcls {

// conv2d (cross-correlation) → bias → optional ReLU → optional max-pool.
//
//   input [N, C, H, W], weight [K, C / groups, kernel_h, kernel_w]
//   conv map [N, K, conv_h, conv_w], never stored; output [N, K, out_h, out_w]
//
// Without a pool the window is 1 × 1 with stride 1, so that out_h = conv_h and out_w = conv_w.
struct ConvBlockShape {
  int64_t N, C, H, W;
  int64_t K, groups;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t conv_h, conv_w;
  int64_t pool_h, pool_w, pool_stride_h, pool_stride_w, pool_pad_h, pool_pad_w;
  int64_t out_h, out_w;
  bool relu;

  auto operator<=>(const ConvBlockShape&) const = default;

  constexpr int64_t group_in() const { return C / groups; }
  constexpr int64_t group_out() const { return K / groups; }
  constexpr int64_t window() const { return pool_h * pool_w; }
  constexpr int64_t out_numel() const { return N * K * out_h * out_w; }
  // Without ReLU and with a 1 × 1 window every gradient passes: there is nothing to remember.
  constexpr bool has_winner() const { return relu || window() > 1; }
  // The greatest code means "ReLU shut", so 8 bits serve windows of up to 255 positions.
  constexpr bool wide_winner() const { return window() > 255; }
};

// PyTorch's formula (torch.nn.Conv2d): floor((in + 2 pad - dilation (kernel - 1) - 1) / stride) + 1
inline int64_t conv_out_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad,
                             int64_t dilation) {
  return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

// PyTorch's formula (torch.nn.MaxPool2d). With ceil_mode a last window that would start in the
// right padding is dropped.
inline int64_t pool_out_size(int64_t in, int64_t window, int64_t stride, int64_t pad,
                             bool ceil_mode) {
  const int64_t span = in + 2 * pad - window + (ceil_mode ? stride - 1 : 0);
  int64_t out = (span >= 0 ? span / stride : -1) + 1;
  if (ceil_mode && (out - 1) * stride >= in + pad) --out;
  return out;
}

}  // namespace fastcls
