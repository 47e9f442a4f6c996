// conv_block on the CPU: check, allocate, pick a kernel.
#include "ops.h"

#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/conv_block_general.h"

namespace fastcls::cpu {

namespace {

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

// Calls f(T, W, Acc) with values of those types, for the dtypes that the checks let through.
template <typename F>
void dispatch_types(ScalarType input, ScalarType weight, const F& f) {
  using BFloat16 = torch::headeronly::BFloat16;
  using Half = torch::headeronly::Half;
  const bool mixed = input != weight;
  if (input == ScalarType::Double) return f(double{}, double{}, double{});
  if (input == ScalarType::Float) return f(float{}, float{}, float{});
  if (input == ScalarType::BFloat16)
    return mixed ? f(BFloat16{}, float{}, float{}) : f(BFloat16{}, BFloat16{}, float{});
  return mixed ? f(Half{}, float{}, float{}) : f(Half{}, Half{}, float{});
}

template <typename F>
void dispatch_winner(const ConvBlockShape& s, const F& f) {
  return s.wide_winner() ? f(int32_t{}) : f(uint8_t{});
}

}  // namespace

std::tuple<Tensor, Tensor> conv_block_forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
    std::vector<int64_t> pool_padding, bool ceil_mode, bool save_winner) {
  const ConvBlockShape s =
      check_conv_block("conv_block", input, weight, bias,
                       {stride, padding, dilation, groups, relu, pool_size, pool_stride,
                        pool_padding, ceil_mode});
  Tensor out = empty_4d(s.N, s.K, s.out_h, s.out_w, input.scalar_type(), input);
  Tensor winner = empty_winner(s, save_winner, input);
  if (s.out_numel() == 0) return {out, winner};
  // The kernels read bias as one run of memory.
  const std::optional<Tensor> flat_bias =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  dispatch_types(input.scalar_type(), weight.scalar_type(), [&](auto t, auto w, auto acc) {
    using T = decltype(t);
    using W = decltype(w);
    dispatch_winner(s, [&](auto code) {
      using Win = decltype(code);
      forward_general<T, W, decltype(acc), Win>(
          s, const_view<T>(input), const_view<W>(weight),
          flat_bias ? static_cast<const W*>(flat_bias->const_data_ptr()) : nullptr,
          mutable_view<T>(out),
          winner.numel() ? static_cast<Win*>(winner.mutable_data_ptr()) : nullptr);
    });
  });
  return {out, winner};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& winner,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
    std::vector<int64_t> pool_padding, bool ceil_mode, bool need_input, bool need_weight,
    bool need_bias) {
  const ConvBlockShape s =
      check_conv_block("conv_block_backward", input, weight, std::nullopt,
                       {stride, padding, dilation, groups, relu, pool_size, pool_stride,
                        pool_padding, ceil_mode});
  check_conv_block_backward(s, grad_out, input, winner);
  const ScalarType w_type = weight.scalar_type();
  Tensor grad_input = need_input ? empty_4d(s.N, s.C, s.H, s.W, input.scalar_type(), input)
                                 : empty_flat({0}, input.scalar_type(), input);
  Tensor grad_weight = need_weight ? empty_4d(s.K, s.group_in(), s.kernel_h, s.kernel_w, w_type, weight)
                                   : empty_flat({0}, w_type, weight);
  Tensor grad_bias = empty_flat({need_bias ? s.K : 0}, w_type, weight);
  dispatch_types(input.scalar_type(), w_type, [&](auto t, auto w, auto acc) {
    using T = decltype(t);
    using W = decltype(w);
    using Acc = decltype(acc);
    dispatch_winner(s, [&](auto code) {
      using Win = decltype(code);
      const Win* codes =
          winner.numel() ? static_cast<const Win*>(winner.const_data_ptr()) : nullptr;
      if (need_input && s.N > 0)
        backward_input_general<T, W, Acc, Win>(s, const_view<T>(grad_out), const_view<W>(weight),
                                               codes, mutable_view<T>(grad_input));
      if (need_weight || need_bias)
        backward_weight_general<T, W, Acc, Win>(
            s, const_view<T>(grad_out), const_view<T>(input), codes,
            need_weight ? mutable_view<W>(grad_weight) : View4<W>{},
            need_bias ? static_cast<W*>(grad_bias.mutable_data_ptr()) : nullptr);
    });
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace fastcls::cpu
