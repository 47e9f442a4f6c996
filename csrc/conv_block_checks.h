// Checks of the conv block's arguments, and the sizes and memory formats that follow from them.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "shapes.h"
#include "tensors.h"

namespace fastcls {

// The arguments of a conv block as the ops receive them. An empty pool_size means no pool.
struct ConvBlockArgs {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  bool relu;
  std::vector<int64_t> pool_size, pool_stride, pool_padding;
  bool ceil_mode;
};

// Up to here sums and products of two arguments fit 64 bits.
constexpr int64_t kGreatestArgument = std::numeric_limits<int32_t>::max();

inline void check_pair(const char* op, const char* name, const std::vector<int64_t>& pair,
                       int64_t least) {
  FASTCLS_CHECK(pair.size() == 2, op, ": ", name, " must have 2 values (height, width), got ",
                pair.size());
  FASTCLS_CHECK(pair[0] >= least && pair[1] >= least, op, ": ", name, " must be at least ", least,
                ", got (", pair[0], ", ", pair[1], ")");
  FASTCLS_CHECK(pair[0] <= kGreatestArgument && pair[1] <= kGreatestArgument, op, ": ", name,
                " must be at most ", kGreatestArgument, ", got (", pair[0], ", ", pair[1], ")");
}

// Offsets into a map, and sizes of buffers that hold one, must fit 64 bits with room to spare.
inline void check_map(const char* op, const char* what, int64_t channels, int64_t h, int64_t w) {
  const double size =
      static_cast<double>(channels) * static_cast<double>(h) * static_cast<double>(w);
  FASTCLS_CHECK(size < 1e18, op, ": the ", what, " is too large: ", channels, " x ", h, " x ", w);
}

inline void check_conv_block_types(const char* op, const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& bias) {
  using torch::headeronly::toString;
  const ScalarType x = input.scalar_type(), w = weight.scalar_type();
  FASTCLS_CHECK(is_floating(x), op, ": input must be float32, float64, bfloat16 or float16, got ",
                toString(x));
  FASTCLS_CHECK(w == x || (w == ScalarType::Float && is_half(x)), op, ": weight must be ",
                toString(x), " like input", is_half(x) ? " or Float" : "", ", got ", toString(w));
  check_same_device(op, "weight", weight, input, "input");
  if (bias) {
    FASTCLS_CHECK(bias->scalar_type() == w, op, ": bias must be ", toString(w),
                  " like weight, got ", toString(bias->scalar_type()));
    check_same_device(op, "bias", *bias, input, "input");
  }
}

// Checks everything and returns the sizes.
inline ConvBlockShape check_conv_block(const char* op, const Tensor& input, const Tensor& weight,
                                       const std::optional<Tensor>& bias,
                                       const ConvBlockArgs& args) {
  FASTCLS_CHECK(input.dim() == 4, op, ": input must be 3D (unbatched) or 4D (N, C, H, W), got ",
                shape_string(input));
  FASTCLS_CHECK(weight.dim() == 4, op,
                ": weight must be 4D (out_channels, in_channels / groups, height, width), got ",
                shape_string(weight));
  check_conv_block_types(op, input, weight, bias);
  check_pair(op, "stride", args.stride, 1);
  check_pair(op, "padding", args.padding, 0);
  check_pair(op, "dilation", args.dilation, 1);
  FASTCLS_CHECK(args.groups >= 1, op, ": groups must be at least 1, got ", args.groups);
  FASTCLS_CHECK(args.groups <= kGreatestArgument, op, ": groups must be at most ",
                kGreatestArgument, ", got ", args.groups);

  ConvBlockShape s{};
  s.N = input.size(0), s.C = input.size(1), s.H = input.size(2), s.W = input.size(3);
  s.K = weight.size(0), s.groups = args.groups;
  s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.stride_h = args.stride[0], s.stride_w = args.stride[1];
  s.pad_h = args.padding[0], s.pad_w = args.padding[1];
  s.dilation_h = args.dilation[0], s.dilation_w = args.dilation[1];
  s.relu = args.relu;
  FASTCLS_CHECK(s.kernel_h >= 1 && s.kernel_w >= 1, op,
                ": weight must have a kernel of at least 1 x 1, got ", shape_string(weight));
  FASTCLS_CHECK(s.kernel_h <= kGreatestArgument && s.kernel_w <= kGreatestArgument, op,
                ": weight must have a kernel of at most ", kGreatestArgument,
                " rows and columns, got ", shape_string(weight));
  FASTCLS_CHECK(weight.size(1) * s.groups == s.C, op, ": input must have ",
                weight.size(1) * s.groups, " channels (weight ", shape_string(weight), ", groups ",
                s.groups, "), got ", s.C);
  FASTCLS_CHECK(s.K >= 1 && s.K % s.groups == 0, op,
                ": out_channels must be a positive multiple of groups (", s.groups, "), got ", s.K);
  FASTCLS_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == s.K), op, ": bias must have shape (",
                s.K, ",), got ", bias ? shape_string(*bias) : "");
  FASTCLS_CHECK(s.C >= 1 && s.H >= 1 && s.W >= 1, op,
                ": input must have channels, height and width of at least 1, got ",
                shape_string(input));
  const int64_t extent_h = s.dilation_h * (s.kernel_h - 1) + 1;
  const int64_t extent_w = s.dilation_w * (s.kernel_w - 1) + 1;
  FASTCLS_CHECK(s.H + 2 * s.pad_h >= extent_h && s.W + 2 * s.pad_w >= extent_w, op,
                ": kernel size (with dilation ", extent_h, " x ", extent_w,
                ") can't be greater than the padded input (", s.H + 2 * s.pad_h, " x ",
                s.W + 2 * s.pad_w, ")");
  s.conv_h = conv_out_size(s.H, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
  s.conv_w = conv_out_size(s.W, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  check_map(op, "padded input", s.C, s.H + 2 * s.pad_h, s.W + 2 * s.pad_w);
  check_map(op, "conv map", s.K, s.conv_h, s.conv_w);

  const bool pool = !args.pool_size.empty();
  if (pool) {
    check_pair(op, "pool_size", args.pool_size, 1);
    check_pair(op, "pool_stride", args.pool_stride, 1);
    check_pair(op, "pool_padding", args.pool_padding, 0);
  }
  s.pool_h = pool ? args.pool_size[0] : 1, s.pool_w = pool ? args.pool_size[1] : 1;
  s.pool_stride_h = pool ? args.pool_stride[0] : 1,
  s.pool_stride_w = pool ? args.pool_stride[1] : 1;
  s.pool_pad_h = pool ? args.pool_padding[0] : 0, s.pool_pad_w = pool ? args.pool_padding[1] : 0;
  FASTCLS_CHECK(s.window() < kGreatestArgument, op, ": pool_size must be of fewer than ",
                kGreatestArgument, " positions, whose codes are 32 bits wide, got (", s.pool_h,
                ", ", s.pool_w, ")");
  FASTCLS_CHECK(2 * s.pool_pad_h <= s.pool_h && 2 * s.pool_pad_w <= s.pool_w, op,
                ": pool_padding must be at most half of pool_size (", s.pool_h, ", ", s.pool_w,
                "), got (", s.pool_pad_h, ", ", s.pool_pad_w, ")");
  s.out_h = pool_out_size(s.conv_h, s.pool_h, s.pool_stride_h, s.pool_pad_h, args.ceil_mode);
  s.out_w = pool_out_size(s.conv_w, s.pool_w, s.pool_stride_w, s.pool_pad_w, args.ceil_mode);
  FASTCLS_CHECK(s.out_h >= 1 && s.out_w >= 1, op, ": pool_size (", s.pool_h, ", ", s.pool_w,
                ") can't be greater than the padded conv map (", s.conv_h + 2 * s.pool_pad_h, " x ",
                s.conv_w + 2 * s.pool_pad_w, ")");
  // A step that is never taken is cut down, so that no product of steps goes beyond the image.
  if (s.conv_h == 1) s.stride_h = 1;
  if (s.conv_w == 1) s.stride_w = 1;
  if (s.out_h == 1) s.pool_stride_h = std::min(s.pool_stride_h, s.pool_h);
  if (s.out_w == 1) s.pool_stride_w = std::min(s.pool_stride_w, s.pool_w);
  return s;
}

// Winner codes [N, out_h, out_w, K], or an empty tensor where there is nothing to remember.
inline ScalarType winner_type(const ConvBlockShape& s) {
  return s.wide_winner() ? ScalarType::Int : ScalarType::Byte;
}

inline Tensor empty_winner(const ConvBlockShape& s, bool save, const Tensor& input) {
  if (!save || !s.has_winner()) return empty_flat({0}, winner_type(s), input);
  return empty_flat({s.N, s.out_h, s.out_w, s.K}, winner_type(s), input);
}

inline void check_conv_block_backward(const ConvBlockShape& s, const Tensor& grad_out,
                                      const Tensor& input, const Tensor& winner) {
  const char* op = "conv_block_backward";
  FASTCLS_CHECK(grad_out.dim() == 4 && grad_out.size(0) == s.N && grad_out.size(1) == s.K &&
                    grad_out.size(2) == s.out_h && grad_out.size(3) == s.out_w,
                op, ": grad_out must have shape (", s.N, ", ", s.K, ", ", s.out_h, ", ", s.out_w,
                "), got ", shape_string(grad_out));
  FASTCLS_CHECK(grad_out.scalar_type() == input.scalar_type(), op, ": grad_out must be ",
                torch::headeronly::toString(input.scalar_type()), " like input, got ",
                torch::headeronly::toString(grad_out.scalar_type()));
  check_same_device(op, "grad_out", grad_out, input, "input");
  check_same_device(op, "winner", winner, input, "input");
  const int64_t expected = s.has_winner() ? s.out_numel() : 0;
  FASTCLS_CHECK(winner.scalar_type() == winner_type(s) && winner.numel() == expected &&
                    winner.is_contiguous(),
                op, ": winner must be the one that conv_block_forward saved (", expected,
                " contiguous ", torch::headeronly::toString(winner_type(s)), "), got ",
                shape_string(winner), " ", torch::headeronly::toString(winner.scalar_type()));
}

// The tensor whose memory format the output of a convolution takes: input, unless that has one
// channel, which lies the same way in both formats; then, as in PyTorch, the weight may ask for
// channels-last.
inline const Tensor& gives_output_format(const Tensor& input, const Tensor& weight) {
  return input.size(1) == 1 && suggests_channels_last(weight) ? weight : input;
}

}  // namespace fastcls
