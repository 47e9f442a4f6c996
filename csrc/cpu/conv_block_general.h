// The conv block in plain loops: the meaning of the op. Serves every argument and dtype, float64
// included; the fast kernels are tested against it. Template arguments as in conv_block.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "conv_block.h"

namespace fastcls::cpu {

using torch::stable::parallel_for;

// Rows [first, first + rows) of the zero-padded image, as Acc [rows, W + 2 pad_w, C]; `first`
// counts from the top of the padding.
template <typename T, typename Acc>
void pack_rows(const ConvBlockShape& s, const View4<const T>& x, int64_t n, int64_t first,
               int64_t rows, Acc* packed) {
  const int64_t width = s.W + 2 * s.pad_w;
  std::fill_n(packed, rows * width * s.C, Acc(0));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = first + r - s.pad_h;
    if (h < 0 || h >= s.H) continue;
    Acc* row = packed + (r * width + s.pad_w) * s.C;
    for (int64_t c = 0; c < s.C; ++c) {
      const T* src = x.at(n, c, h, 0);
      for (int64_t w = 0; w < s.W; ++w) row[w * s.C + c] = static_cast<Acc>(src[w * x.w]);
    }
  }
}

// [groups, kernel_h, kernel_w, C / groups, K / groups]: output channels innermost.
template <typename W, typename Acc>
std::vector<Acc> pack_weight_forward(const ConvBlockShape& s, const View4<const W>& weight) {
  std::vector<Acc> packed(s.K * s.group_in() * s.kernel_h * s.kernel_w);
  Acc* dst = packed.data();
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t i = 0; i < s.kernel_h; ++i)
      for (int64_t j = 0; j < s.kernel_w; ++j)
        for (int64_t c = 0; c < s.group_in(); ++c)
          for (int64_t k = 0; k < s.group_out(); ++k)
            *dst++ = static_cast<Acc>(*weight.at(g * s.group_out() + k, c, i, j));
  return packed;
}

// One conv-map row [conv_w, K], bias included. `input` is the packed row under the kernel's top.
template <typename Acc>
void conv_row(const ConvBlockShape& s, const Acc* input, const Acc* weight, const Acc* bias,
              Acc* out) {
  // 16 accumulators stay in registers over the whole reduction on every target (4 × SSE).
  constexpr int64_t kBlock = 16;
  const int64_t width = s.W + 2 * s.pad_w, Cg = s.group_in(), Kg = s.group_out();
  for (int64_t cw = 0; cw < s.conv_w; ++cw)
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t k0 = 0; k0 < Kg; k0 += kBlock) {
        const int64_t lanes = std::min(kBlock, Kg - k0);
        Acc sum[kBlock] = {};
        for (int64_t i = 0; i < s.kernel_h; ++i)
          for (int64_t j = 0; j < s.kernel_w; ++j) {
            const Acc* x = input +
                           (i * s.dilation_h * width + cw * s.stride_w + j * s.dilation_w) * s.C +
                           g * Cg;
            const Acc* w = weight + ((g * s.kernel_h + i) * s.kernel_w + j) * Cg * Kg + k0;
            if (lanes == kBlock) {
              for (int64_t c = 0; c < Cg; ++c, w += Kg)
                for (int64_t k = 0; k < kBlock; ++k) sum[k] += x[c] * w[k];
            } else {
              for (int64_t c = 0; c < Cg; ++c, w += Kg)
                for (int64_t k = 0; k < lanes; ++k) sum[k] += x[c] * w[k];
            }
          }
        Acc* dst = out + cw * s.K + g * Kg + k0;
        for (int64_t k = 0; k < lanes; ++k) dst[k] = sum[k] + bias[g * Kg + k0 + k];
      }
}

// Max, its place and the ReLU of one window. PyTorch's rule: first maximum in row-major order,
// except that every NaN takes over; a maximum that is not > 0 (and no NaN) shuts the ReLU.
template <typename Acc, typename Win>
Acc pool_window(const ConvBlockShape& s, const Acc* conv, int64_t first_row, int64_t ph, int64_t pw,
                int64_t k, Win* winner) {
  const int64_t h0 = ph * s.pool_stride_h - s.pool_pad_h, w0 = pw * s.pool_stride_w - s.pool_pad_w;
  const int64_t h_begin = std::max<int64_t>(h0, 0), h_end = std::min(h0 + s.pool_h, s.conv_h);
  const int64_t w_begin = std::max<int64_t>(w0, 0), w_end = std::min(w0 + s.pool_w, s.conv_w);
  Acc best = -std::numeric_limits<Acc>::infinity();
  int64_t place = (h_begin - h0) * s.pool_w + (w_begin - w0);
  for (int64_t h = h_begin; h < h_end; ++h)
    for (int64_t w = w_begin; w < w_end; ++w) {
      const Acc value = conv[((h - first_row) * s.conv_w + w) * s.K + k];
      if (value > best || std::isnan(value)) best = value, place = (h - h0) * s.pool_w + (w - w0);
    }
  *winner = static_cast<Win>(place);
  if (s.relu && best <= Acc(0)) *winner = kShut<Win>, best = Acc(0);
  return best;
}

template <typename T, typename W, typename Acc, typename Win>
void forward_general(const ConvBlockShape& s, const View4<const T>& x, const View4<const W>& weight,
                     const W* bias, const View4<T>& out, Win* winner) {
  const std::vector<Acc> packed_weight = pack_weight_forward<W, Acc>(s, weight);
  std::vector<Acc> packed_bias(s.K, Acc(0));
  if (bias != nullptr)
    std::transform(bias, bias + s.K, packed_bias.begin(), [](W b) { return static_cast<Acc>(b); });

  // One unit of work is one pooled row of one image.
  parallel_for(0, s.N * s.out_h, 1, [&](int64_t begin, int64_t end) {
    const int64_t width = s.W + 2 * s.pad_w;
    const int64_t rows = std::min(s.pool_h, s.conv_h);  // of the conv map in one window
    const int64_t max_in = (rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
    std::vector<Acc> packed(max_in * width * s.C), conv(rows * s.conv_w * s.K);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / s.out_h, ph = unit % s.out_h;
      const int64_t h0 = ph * s.pool_stride_h - s.pool_pad_h;
      const int64_t row0 = std::max<int64_t>(h0, 0), row1 = std::min(h0 + s.pool_h, s.conv_h);
      const int64_t rows_in = (row1 - row0 - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
      pack_rows(s, x, n, row0 * s.stride_h, rows_in, packed.data());
      for (int64_t row = row0; row < row1; ++row)
        conv_row(s, packed.data() + (row - row0) * s.stride_h * width * s.C, packed_weight.data(),
                 packed_bias.data(), conv.data() + (row - row0) * s.conv_w * s.K);
      for (int64_t pw = 0; pw < s.out_w; ++pw)
        for (int64_t k = 0; k < s.K; ++k) {
          Win code;
          *out.at(n, k, ph, pw) =
              static_cast<T>(pool_window(s, conv.data(), row0, ph, pw, k, &code));
          if (winner) winner[(unit * s.out_w + pw) * s.K + k] = code;
        }
    }
  });
}

// dX[n, c, h + i - pad, w + j - pad] += g · weight[k, c, i, j] for each open winner (h, w) of
// channel k. One thread owns one image.
template <typename T, typename W, typename Acc, typename Win>
void backward_input_general(const ConvBlockShape& s, const View4<const T>& grad_out,
                            const View4<const W>& weight, const Win* winner,
                            const View4<T>& grad_input) {
  // [K, kernel_h, kernel_w, C / groups]: input channels innermost.
  const int64_t Cg = s.group_in(), taps = s.kernel_h * s.kernel_w;
  std::vector<Acc> packed_weight(s.K * taps * Cg);
  for (int64_t k = 0; k < s.K; ++k)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < Cg; ++c)
        packed_weight[(k * taps + t) * Cg + c] =
            static_cast<Acc>(*weight.at(k, c, t / s.kernel_w, t % s.kernel_w));

  const int64_t width = s.W + 2 * s.pad_w, height = s.H + 2 * s.pad_h;
  parallel_for(0, s.N, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> grad(height * width * s.C);
    for (int64_t n = begin; n < end; ++n) {
      std::fill(grad.begin(), grad.end(), Acc(0));
      for (int64_t ph = 0; ph < s.out_h; ++ph)
        for (int64_t pw = 0; pw < s.out_w; ++pw)
          for (int64_t k = 0; k < s.K; ++k) {
            const Win code =
                winner ? winner[((n * s.out_h + ph) * s.out_w + pw) * s.K + k] : Win(0);
            if (code == kShut<Win>) continue;
            const Acc g = static_cast<Acc>(*grad_out.at(n, k, ph, pw));
            int64_t h, w;
            winner_position(s, ph, pw, code, &h, &w);
            Acc* top = grad.data() + (h * s.stride_h * width + w * s.stride_w) * s.C +
                       k / s.group_out() * Cg;
            const Acc* wk = packed_weight.data() + k * taps * Cg;
            for (int64_t i = 0; i < s.kernel_h; ++i)
              for (int64_t j = 0; j < s.kernel_w; ++j, wk += Cg) {
                Acc* dst = top + (i * s.dilation_h * width + j * s.dilation_w) * s.C;
                for (int64_t c = 0; c < Cg; ++c) dst[c] += g * wk[c];
              }
          }
      for (int64_t c = 0; c < s.C; ++c)
        for (int64_t h = 0; h < s.H; ++h)
          for (int64_t w = 0; w < s.W; ++w)
            *grad_input.at(n, c, h, w) =
                static_cast<T>(grad[((h + s.pad_h) * width + w + s.pad_w) * s.C + c]);
    }
  });
}

// dW[k, c, i, j] = Σ g · x[n, c, h + i - pad, w + j - pad] over the open winners (h, w) of channel
// k, and db[k] = Σ g. One thread owns a range of k and goes over all images in order, so that the
// sum does not depend on the number of threads; the sum over one image is rounded apart from the
// total, which keeps float error from growing with the batch.
template <typename T, typename W, typename Acc, typename Win>
void backward_weight_general(const ConvBlockShape& s, const View4<const T>& grad_out,
                             const View4<const T>& x, const Win* winner,
                             const View4<W>& grad_weight, W* grad_bias) {
  const int64_t Cg = s.group_in(), taps = s.kernel_h * s.kernel_w, per_channel = taps * Cg;
  const int64_t width = s.W + 2 * s.pad_w, height = s.H + 2 * s.pad_h;
  parallel_for(0, s.K, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> packed(height * width * s.C);
    std::vector<Acc> total((end - begin) * (per_channel + 1)), image(per_channel + 1);
    for (int64_t n = 0; n < s.N; ++n) {
      pack_rows(s, x, n, 0, height, packed.data());
      for (int64_t k = begin; k < end; ++k) {
        std::fill(image.begin(), image.end(), Acc(0));
        for (int64_t ph = 0; ph < s.out_h; ++ph)
          for (int64_t pw = 0; pw < s.out_w; ++pw) {
            const Win code =
                winner ? winner[((n * s.out_h + ph) * s.out_w + pw) * s.K + k] : Win(0);
            if (code == kShut<Win>) continue;
            const Acc g = static_cast<Acc>(*grad_out.at(n, k, ph, pw));
            int64_t h, w;
            winner_position(s, ph, pw, code, &h, &w);
            const Acc* top = packed.data() + (h * s.stride_h * width + w * s.stride_w) * s.C +
                             k / s.group_out() * Cg;
            Acc* dst = image.data();
            for (int64_t i = 0; i < s.kernel_h; ++i)
              for (int64_t j = 0; j < s.kernel_w; ++j, dst += Cg) {
                const Acc* src = top + (i * s.dilation_h * width + j * s.dilation_w) * s.C;
                for (int64_t c = 0; c < Cg; ++c) dst[c] += g * src[c];
              }
            image[per_channel] += g;
          }
        Acc* sum = total.data() + (k - begin) * (per_channel + 1);
        for (int64_t e = 0; e <= per_channel; ++e) sum[e] += image[e];
      }
    }
    for (int64_t k = begin; k < end; ++k) {
      const Acc* sum = total.data() + (k - begin) * (per_channel + 1);
      if (grad_weight.data)
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t c = 0; c < Cg; ++c)
            *grad_weight.at(k, c, t / s.kernel_w, t % s.kernel_w) = static_cast<W>(sum[t * Cg + c]);
      if (grad_bias) grad_bias[k] = static_cast<W>(sum[per_channel]);
    }
  });
}

}  // namespace fastcls::cpu
