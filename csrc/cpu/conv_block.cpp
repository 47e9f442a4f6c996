// conv_block on the CPU: check, allocate, pick a kernel.
#include "ops.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/conv_block_fast.h"
#include "cpu/conv_block_general.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace fastcls::cpu {

namespace {

// Kernels of the instruction set in use, or empty ones: the general kernel serves.
template <typename T>
ConvBlockKernels<T> fast_kernels(const ConvBlockShape& s) {
#if defined(__x86_64__)
  if (fast_path_serves(s)) {
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
      if (isa() == Isa::kAvx512Bf16) return avx512_bf16::conv_block_kernels<T>();
    if (isa() >= Isa::kAvx512) return avx512::conv_block_kernels<T>();
    if (isa() == Isa::kAvx2) return avx2::conv_block_kernels<T>();
  }
#endif
  return {};
}

// Weights to pack, and products, that are worth waking a thread for.
constexpr double kThreadWeights = 32768, kThreadProducts = 1 << 19;

// The least of `parts` equal parts of `work` that make up `of_thread`.
int64_t grain(int64_t parts, double work, double of_thread) {
  return static_cast<int64_t>(std::max(of_thread * parts / std::max(work, 1.0), 1.0));
}

double weights(const ConvBlockShape& s) {
  return static_cast<double>(s.K * s.C * s.kernel_h * s.kernel_w);
}
double products(const ConvBlockShape& s) {
  return static_cast<double>(s.N) * s.conv_h * s.conv_w * weights(s);
}

// Calls f(i) for `n` parts of the weights, on several threads if there are enough weights.
template <typename F>
void for_parts_of_weights(const ConvBlockShape& s, int64_t n, const F& f) {
  parallel_for(0, n, grain(n, weights(s), kThreadWeights), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// A copy [K, kernel_h, kernel_w, C].
template <typename W>
Scratch<float> float_copy(const ConvBlockShape& s, const View4<const W>& weight) {
  const int64_t row = s.kernel_h * s.kernel_w * s.C;
  Scratch<float> copy;
  copy.reserve(s.K * row);
  for_parts_of_weights(s, s.K, [&](int64_t k) {
    float* dst = copy.data + k * row;
    for (int64_t i = 0; i < s.kernel_h; ++i)
      for (int64_t j = 0; j < s.kernel_w; ++j)
        for (int64_t c = 0; c < s.C; ++c) *dst++ = static_cast<float>(*weight.at(k, c, i, j));
  });
  return copy;
}

// Weights of either memory format as they are, or nothing.
template <typename W>
std::optional<DenseWeight> in_place(const ConvBlockShape& s, const View4<const W>& w) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  if constexpr (std::is_same_v<W, float>)
    if (w.n == s.C * taps) {
      if (w.w == 1 && w.h == s.kernel_w && w.c == taps) return DenseWeight{w.data, taps, 1};
      if (w.c == 1 && w.w == s.C && w.h == s.C * s.kernel_w) return DenseWeight{w.data, 1, s.C};
    }
  return std::nullopt;
}

template <typename W>
Scratch<float> pack(const WeightPacker& packer, const ConvBlockShape& s,
                    const View4<const W>& weight) {
  std::optional<DenseWeight> dense = in_place(s, weight);
  Scratch<float> copy;
  if (!dense) {
    copy = float_copy(s, weight);
    dense = DenseWeight{copy.data, 1, s.C};
  }
  Scratch<float> packed;
  packed.reserve(packer.floats(s));
  for_parts_of_weights(s, packer.blocks(s),
                       [&](int64_t block) { packer.pack(s, *dense, block, packed.data); });
  return packed;
}

// Fewer bands than threads are shared out by channels: several shares to a thread, so that none
// waits long for the others, but none too small to wake one for.
ForwardUnits forward_units(const ConvBlockShape& s, int64_t blocks) {
  constexpr int64_t kSharesOfThread = 4;
  const int64_t rows = band_rows(s), bands = (s.out_h + rows - 1) / rows, all = s.N * bands;
  const int64_t threads = torch::stable::get_num_threads();
  if (all >= threads) return {rows, bands, 1};
  const int64_t wanted = (kSharesOfThread * threads + all - 1) / all;
  const int64_t worthwhile = static_cast<int64_t>(products(s) / all / kThreadProducts);
  return {rows, bands, std::clamp<int64_t>(std::min(wanted, worthwhile), 1, blocks)};
}

template <typename T, typename W>
void forward_fast(const ConvBlockKernels<T>& kernels, const ConvBlockShape& s,
                  const View4<const T>& x, const View4<const W>& weight, const W* bias,
                  const View4<T>& out, uint8_t* winner) {
  const Scratch<float> packed = pack(kernels.forward_weight, s, weight);
  std::vector<float> float_bias(s.K + kBiasPadding, 0.f);
  if (bias)
    for (int64_t k = 0; k < s.K; ++k) float_bias[k] = static_cast<float>(bias[k]);
  const ForwardUnits units = forward_units(s, kernels.forward_weight.blocks(s));
  const int64_t count = s.N * units.bands * units.shares;
  parallel_for(
      0, count, grain(count, products(s), kThreadProducts), [&](int64_t begin, int64_t end) {
        kernels.forward(s, x, packed.data, float_bias.data(), out, winner, units, begin, end);
      });
}

template <typename T, typename W>
void backward_input_fast(const ConvBlockKernels<T>& kernels, const ConvBlockShape& s,
                         const View4<const T>& grad_out, const View4<const W>& weight,
                         const uint8_t* winner, const View4<T>& grad_input) {
  const Scratch<float> packed = pack(kernels.input_weight, s, weight);
  parallel_for(0, s.N, grain(s.N, products(s), kThreadProducts), [&](int64_t begin, int64_t end) {
    kernels.backward_input(s, grad_out, packed.data, winner, grad_input, begin, end);
  });
}

// The sum over images goes by chunks, whose partial sums are then added up in order: the result
// depends on the shape alone, not on the number of threads. At least 8 chunks to share out among
// threads, up to 32 as long as their sums stay within 2 MiB, so that they come from the cache; but
// down to 2 where 8 would take more than 128 MiB.
template <typename T, typename W>
void backward_weight_fast(const ConvBlockKernels<T>& kernels, const ConvBlockShape& s,
                          const View4<const T>& grad_out, const View4<const T>& x,
                          const uint8_t* winner, const View4<W>& grad_weight, W* grad_bias) {
  const int64_t taps = s.kernel_h * s.kernel_w, row = taps * s.C + 1, size = s.K * row;
  const int64_t least = std::clamp<int64_t>((int64_t{1} << 25) / size, 2, 8);
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 19) / size, least, 32);
  const int64_t chunk = std::max<int64_t>((s.N + most - 1) / most, 1);
  const int64_t units = (s.N + chunk - 1) / chunk;
  const std::unique_ptr<float[]> partial(new float[units * size]);
  ask_for_huge_pages(partial.get(), units * size * sizeof(float));
  parallel_for(0, units, grain(units, products(s), kThreadProducts),
               [&](int64_t begin, int64_t end) {
                 kernels.backward_weight(s, grad_out, x, winner, partial.get(), chunk, begin, end);
               });
  parallel_for(0, s.K, grain(s.K, units * size, kThreadWeights), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(row);
    for (int64_t k = begin; k < end; ++k) {
      std::fill(sum.begin(), sum.end(), 0.f);
      for (int64_t u = 0; u < units; ++u)
        for (int64_t e = 0; e < row; ++e) sum[e] += partial[(u * s.K + k) * row + e];
      if (grad_weight.data)
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t c = 0; c < s.C; ++c)
            *grad_weight.at(k, c, t / s.kernel_w, t % s.kernel_w) =
                static_cast<W>(sum[t * s.C + c]);
      if (grad_bias) grad_bias[k] = static_cast<W>(sum[row - 1]);
    }
  });
}

}  // namespace

int64_t conv_block_path(const Tensor& input, const Tensor& weight, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
                        std::vector<int64_t> pool_padding, bool ceil_mode, bool) {
  const ConvBlockShape s = check_conv_block(
      "conv_block_path", input, weight, std::nullopt,
      {stride, padding, dilation, groups, relu, pool_size, pool_stride, pool_padding, ceil_mode});
  ConvBlockPath path = ConvBlockPath::kGeneral;
  dispatch_types(input.scalar_type(), weight.scalar_type(), [&](auto t, auto, auto) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, double>)
      if (const auto kernels = fast_kernels<T>(s); kernels.forward)
        path = kernels.winograd_serves(s) ? ConvBlockPath::kWinograd : ConvBlockPath::kDirect;
  });
  return static_cast<int64_t>(path);
}

std::tuple<Tensor, Tensor> conv_block_forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
    std::vector<int64_t> pool_padding, bool ceil_mode, bool save_winner, bool) {
  const ConvBlockShape s = check_conv_block(
      "conv_block", input, weight, bias,
      {stride, padding, dilation, groups, relu, pool_size, pool_stride, pool_padding, ceil_mode});
  const Tensor out = with_huge_pages(empty_4d(s.N, s.K, s.out_h, s.out_w, input.scalar_type(),
                                              gives_output_format(input, weight)));
  const Tensor winner = with_huge_pages(empty_winner(s, save_winner, input));
  if (s.out_numel() == 0) return {out, winner};
  // The kernels read bias as one run of memory.
  const std::optional<Tensor> flat_bias =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  dispatch_types(input.scalar_type(), weight.scalar_type(), [&](auto t, auto w, auto acc) {
    using T = decltype(t);
    using W = decltype(w);
    const W* b = flat_bias ? static_cast<const W*>(flat_bias->const_data_ptr()) : nullptr;
    void* codes = winner.numel() ? winner.mutable_data_ptr() : nullptr;
    if constexpr (!std::is_same_v<T, double>)
      if (const auto kernels = fast_kernels<T>(s); kernels.forward)
        return forward_fast<T, W>(kernels, s, const_view<T>(input), const_view<W>(weight), b,
                                  mutable_view<T>(out), static_cast<uint8_t*>(codes));
    dispatch_winner(s, [&](auto code) {
      using Win = decltype(code);
      forward_general<T, W, decltype(acc), Win>(s, const_view<T>(input), const_view<W>(weight), b,
                                                mutable_view<T>(out), static_cast<Win*>(codes));
    });
  });
  return {out, winner};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& winner,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
    std::vector<int64_t> pool_padding, bool ceil_mode, bool need_input, bool need_weight,
    bool need_bias, bool) {
  const ConvBlockShape s = check_conv_block(
      "conv_block_backward", input, weight, std::nullopt,
      {stride, padding, dilation, groups, relu, pool_size, pool_stride, pool_padding, ceil_mode});
  check_conv_block_backward(s, grad_out, input, winner);
  const ScalarType w_type = weight.scalar_type();
  Tensor grad_input =
      need_input ? with_huge_pages(empty_4d(s.N, s.C, s.H, s.W, input.scalar_type(), input))
                 : empty_flat({0}, input.scalar_type(), input);
  Tensor grad_weight = need_weight
                           ? empty_4d(s.K, s.group_in(), s.kernel_h, s.kernel_w, w_type, weight)
                           : empty_flat({0}, w_type, weight);
  Tensor grad_bias = empty_flat({need_bias ? s.K : 0}, w_type, weight);
  dispatch_types(input.scalar_type(), w_type, [&](auto t, auto w, auto acc) {
    using T = decltype(t);
    using W = decltype(w);
    using Acc = decltype(acc);
    const View4<const T> g = const_view<T>(grad_out), x = const_view<T>(input);
    const View4<T> dx = need_input ? mutable_view<T>(grad_input) : View4<T>{};
    const View4<W> dw = need_weight ? mutable_view<W>(grad_weight) : View4<W>{};
    W* db = need_bias ? static_cast<W*>(grad_bias.mutable_data_ptr()) : nullptr;
    const void* saved = winner.numel() ? winner.const_data_ptr() : nullptr;
    if constexpr (!std::is_same_v<T, double>)
      if (const auto kernels = fast_kernels<T>(s); kernels.forward) {
        const uint8_t* codes = static_cast<const uint8_t*>(saved);
        if (need_input) backward_input_fast<T, W>(kernels, s, g, const_view<W>(weight), codes, dx);
        if (need_weight || need_bias) backward_weight_fast<T, W>(kernels, s, g, x, codes, dw, db);
        return;
      }
    dispatch_winner(s, [&](auto code) {
      using Win = decltype(code);
      const Win* codes = static_cast<const Win*>(saved);
      if (need_input)
        backward_input_general<T, W, Acc, Win>(s, g, const_view<W>(weight), codes, dx);
      if (need_weight || need_bias) backward_weight_general<T, W, Acc, Win>(s, g, x, codes, dw, db);
    });
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace fastcls::cpu
