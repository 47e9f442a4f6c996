// What the conv block's CPU and CUDA kernels share: views, winner codes, dtypes.
//
// T: input and output, W: weight and bias (T, or float with half T), Acc: arithmetic (double for
// double, else float), Win: winner code (uint8_t, or int32_t for windows of more than 255).
#pragma once

#include <cstdint>
#include <limits>

#include "conv_block_checks.h"
#include "dtypes.h"

namespace fastcls {

// A tensor [N, C, H, W] of any strides (in elements).
template <typename T>
struct View4 {
  T* data;
  int64_t n, c, h, w;
  constexpr T* at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
    return data + in * n + ic * c + ih * h + iw * w;
  }
  constexpr View4 from_channel(int64_t ic) const { return {at(0, ic, 0, 0), n, c, h, w}; }
  constexpr View4 from_column(int64_t iw) const { return {at(0, 0, 0, iw), n, c, h, w}; }
};

template <typename T>
View4<const T> const_view(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
          t.stride(3)};
}

template <typename T>
View4<T> mutable_view(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
          t.stride(3)};
}

// The winner code that says "ReLU shut".
template <typename Win>
constexpr Win kShut = std::numeric_limits<Win>::max();

// Conv-map position of winner code `code` of pooled output (ph, pw). A code fits an int, and a
// GPU divides ints several times faster than int64_t.
template <typename Win>
constexpr void winner_position(const ConvBlockShape& s, int64_t ph, int64_t pw, Win code,
                               int64_t* ch, int64_t* cw) {
  const int place = code, pool_w = static_cast<int>(s.pool_w);
  *ch = ph * s.pool_stride_h - s.pool_pad_h + place / pool_w;
  *cw = pw * s.pool_stride_w - s.pool_pad_w + place % pool_w;
}

template <typename F>
void dispatch_winner(const ConvBlockShape& s, const F& f) {
  return s.wide_winner() ? f(int32_t{}) : f(uint8_t{});
}

}  // namespace fastcls
