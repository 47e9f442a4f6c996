// Checks of op arguments and their messages, shared by CPU and CUDA.
// A message names operation, argument, what was expected and what came. The exception types are
// those that PyTorch raises for the same mistake: RuntimeError unless said otherwise.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cross_entropy.h"
#include "shapes.h"

namespace fastcls {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
std::string message(const Args&... args) {
  std::ostringstream text;
  ((text << args), ...);
  return text.str();
}

#define FASTCLS_CHECK(condition, ...)                                          \
  do {                                                                         \
    if (!(condition)) throw std::runtime_error(fastcls::message(__VA_ARGS__)); \
  } while (0)

inline std::string shape_string(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape_string(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline bool is_half(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                              const char* like_name) {
  FASTCLS_CHECK(t.device() == like.device(), op, ": ", name, " must be on the device of ",
                like_name, " (", like.is_cpu() ? "cpu" : "cuda:",
                like.is_cpu() ? "" : std::to_string(like.get_device_index()), "), got ",
                t.is_cpu()    ? "cpu"
                : t.is_cuda() ? "cuda:"
                              : "another device type",
                t.is_cuda() ? std::to_string(t.get_device_index()) : "");
}

// True where PyTorch's suggest_memory_format says channels-last: strides ordered N, H, W, C, with
// the ambiguous cases (one channel, one pixel) counted as contiguous.
inline bool suggests_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

// Under the emulator new memory is NaN, or -1: what a kernel leaves unwritten shows.
inline Tensor poisoned(Tensor t) {
#ifdef FASTCLS_POISON
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());
#endif
  return t;
}

// A new tensor on the device of `like`. Much faster than torch::stable::empty, which looks its op
// up by name in every call.
inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                            ScalarType dtype, const Tensor& like) {
  using torch::stable::detail::from;
  const auto code = torch::stable::detail::to<int32_t>(from(dtype));
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dims, sizes, strides, code, device_type, device_index, &handle) != 0)
    throw std::runtime_error(message("not enough memory for a tensor of shape ",
                                     shape_string(std::vector<int64_t>(sizes, sizes + dims)), ", ",
                                     torch::headeronly::toString(dtype)));
  return poisoned(Tensor(handle));
}

// A new tensor [N, C, H, W] in the memory format that `like` suggests.
inline Tensor empty_4d(int64_t N, int64_t C, int64_t H, int64_t W, ScalarType dtype,
                       const Tensor& like) {
  const int64_t sizes[] = {N, C, H, W};
  // PyTorch counts an empty dimension as 1 here.
  C = std::max<int64_t>(C, 1), H = std::max<int64_t>(H, 1), W = std::max<int64_t>(W, 1);
  const int64_t contiguous[] = {C * H * W, H * W, W, 1};
  const int64_t channels_last[] = {H * W * C, 1, W * C, C};
  return empty_strided(4, sizes, suggests_channels_last(like) ? channels_last : contiguous, dtype,
                       like);
}

// The tensor whose memory format the output of a convolution takes: input, unless that has one
// channel, which lies the same way in both formats; then, as in PyTorch, the weight may ask for
// channels-last.
inline const Tensor& gives_output_format(const Tensor& input, const Tensor& weight) {
  return input.size(1) == 1 && suggests_channels_last(weight) ? weight : input;
}

inline Tensor empty_flat(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  for (size_t d = sizes.size(); d-- > 0; numel *= std::max<int64_t>(sizes[d], 1))
    strides[d] = numel;
  return empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, like);
}

// A new tensor of t's shape, dtype and memory format.
inline Tensor new_like(const Tensor& t) {
  if (!t.is_contiguous()) return poisoned(torch::stable::empty_like(t));
  return empty_strided(t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type(), t);
}

// What an op returns in the place of an output that was not asked for: None in Python.
inline Tensor no_tensor() {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&handle));
  return Tensor(handle);
}

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

// What the arguments of a cross-entropy say about sizes.
struct CrossEntropyShape {
  std::vector<int64_t> batch;  // input's shape without its class dimension
  int64_t C;
  bool prob;  // target holds class probabilities, not class indices

  int64_t rows() const {
    int64_t rows = 1;
    for (int64_t size : batch) rows *= size;
    return rows;
  }
};

inline bool is_index(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return true;
    default:
      return false;
  }
}

// PyTorch's rule: a target of input's shape holds probabilities, any other holds indices.
inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline void check_cross_entropy_index(const char* op, const Tensor& input, const Tensor& target,
                                      const CrossEntropyShape& s) {
  // fastcls/functional.py turns "batch size" errors into ValueError, which no exception of C++
  // does.
  if (input.dim() == 1) {
    FASTCLS_CHECK(target.numel() == 1 && target.dim() <= 1, op,
                  ": target must have batch size 1, shape () or (1,), with a 1D input, got ",
                  shape_string(target));
  } else {
    FASTCLS_CHECK(target.dim() > 0 && target.size(0) == input.size(0), op,
                  ": target must have batch size ", input.size(0), " like input, got ",
                  shape_string(target));
    bool fits = target.dim() == input.dim() - 1;
    for (int64_t d = 1; fits && d < target.dim(); ++d) fits = target.size(d) == input.size(d + 1);
    FASTCLS_CHECK(fits, op, ": target must have shape ", shape_string(s.batch),
                  " (class indices) or ", shape_string(input), " (class probabilities), got ",
                  shape_string(target));
  }
  FASTCLS_CHECK(is_index(target.scalar_type()), op,
                ": target must have an integer dtype (class indices of shape ",
                shape_string(s.batch), "), got ",
                torch::headeronly::toString(target.scalar_type()));
}

inline void check_cross_entropy_prob(const char* op, const Tensor& input, const Tensor& target,
                                     int64_t ignore_index) {
  using torch::headeronly::toString;
  const ScalarType x = input.scalar_type(), t = target.scalar_type();
  FASTCLS_CHECK(is_floating(t), op, ": target must have a floating point dtype (class ",
                "probabilities, as it has input's shape ", shape_string(input), "), got ",
                toString(t));
  FASTCLS_CHECK(t == x || (is_half(x) && t == ScalarType::Float), op, ": target must be ",
                toString(x), " like input", is_half(x) ? " or Float" : "", ", got ", toString(t));
  FASTCLS_CHECK(ignore_index < 0, op,
                ": ignore_index must be negative (unused) with class probabilities, got ",
                ignore_index);
}

inline CrossEntropyShape check_cross_entropy(const char* op, const Tensor& input,
                                             const Tensor& target,
                                             const std::optional<Tensor>& weight,
                                             int64_t ignore_index, int64_t reduction,
                                             double label_smoothing) {
  using torch::headeronly::toString;
  const ScalarType x = input.scalar_type();
  FASTCLS_CHECK(is_floating(x), op, ": input must be float32, float64, bfloat16 or float16, got ",
                toString(x));
  FASTCLS_CHECK(input.dim() >= 1, op,
                ": input must have shape (C), (N, C) or (N, C, d1, ...), got ",
                shape_string(input));
  const int64_t class_dim = input.dim() == 1 ? 0 : 1;
  CrossEntropyShape s{{}, input.size(class_dim), same_shape(input, target)};
  for (int64_t d = 0; d < input.dim(); ++d)
    if (d != class_dim) s.batch.push_back(input.size(d));
  check_same_device(op, "target", target, input, "input");
  if (s.prob) {
    check_cross_entropy_prob(op, input, target, ignore_index);
  } else {
    check_cross_entropy_index(op, input, target, s);
  }
  if (weight) {
    const ScalarType w = weight->scalar_type();
    FASTCLS_CHECK(weight->dim() == 1 && weight->size(0) == s.C, op, ": weight must have shape (",
                  s.C, ",), one value per class, got ", shape_string(*weight));
    FASTCLS_CHECK(w == x || (is_half(x) && w == ScalarType::Float), op, ": weight must be ",
                  toString(x), " like input", is_half(x) ? " or Float" : "", ", got ", toString(w));
    check_same_device(op, "weight", *weight, input, "input");
  }
  FASTCLS_CHECK(reduction >= kNone && reduction <= kSum, op,
                ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  FASTCLS_CHECK(!(label_smoothing > 1), op, ": label_smoothing must be between 0.0 and 1.0, got ",
                label_smoothing);
  return s;
}

// PyTorch computes without smoothing where the factor is negative or NaN.
inline double effective_smoothing(double label_smoothing) {
  return label_smoothing > 0 ? label_smoothing : 0;
}

// The operands are input, the target if it holds probabilities, and the gradient if there is one.
inline RowLayout row_layout(const char* op, const CrossEntropyShape& s,
                            const Tensor* (&&operands)[kRowOperands]) {
  RowLayout layout;
  layout.C = s.C;
  const int64_t dims = operands[kInput]->dim();
  const int64_t class_dim = dims == 1 ? 0 : 1;
  auto stride = [&](int k, int64_t d) { return operands[k] ? operands[k]->stride(d) : 0; };
  for (int k = 0; k < kRowOperands; ++k) layout.class_stride[k] = stride(k, class_dim);
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = operands[kInput]->size(d);
    if (d == class_dim || size == 1) continue;
    layout.rows *= size;
    const int last = layout.dims - 1;
    bool merge = last >= 0;
    for (int k = 0; merge && k < kRowOperands; ++k)
      merge = !operands[k] || layout.stride[k][last] == stride(k, d) * size;
    FASTCLS_CHECK(merge || layout.dims < kMaxRowDims, op, ": input must have at most ", kMaxRowDims,
                  " dimensions that do not merge into one, got ", shape_string(*operands[kInput]));
    const int at = merge ? last : layout.dims++;
    layout.size[at] = merge ? layout.size[at] * size : size;
    for (int k = 0; k < kRowOperands; ++k) layout.stride[k][at] = stride(k, d);
  }
  return layout;
}

// Saved for backward, flat: the maximum of each row, the log of each row's sum of exp(x - maximum),
// and the divisor of the mean. Maximum and log stay apart because their sum would lose the log's
// digits where logits are large.
inline int64_t saved_numel(int64_t rows) { return 2 * rows + 1; }

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_cross_entropy_outputs(const char* op, const CrossEntropyShape& s, int64_t save,
                                        bool count_hits) {
  FASTCLS_CHECK(save >= kSaveNothing && save <= kSaveGrad, op,
                ": save must be 0 (nothing), 1 (two numbers per row) or 2 (gradient), got ", save);
  FASTCLS_CHECK(!count_hits || !s.prob, op,
                ": target must hold class indices where hits are counted, got probabilities");
}

inline Tensor empty_saved(int64_t save, int64_t rows, const Tensor& input) {
  if (save == kSaveNothing) return no_tensor();
  if (save == kSaveGrad) return new_like(input);
  return empty_flat({saved_numel(rows)}, accumulate_type(input.scalar_type()), input);
}

// The number of rows whose greatest logit, the first of equal ones, is that of the target.
inline Tensor empty_hits(bool count_hits, const Tensor& input) {
  return count_hits ? empty_flat({}, ScalarType::Long, input) : no_tensor();
}

inline void check_cross_entropy_backward(const CrossEntropyShape& s, const Tensor& grad_loss,
                                         const Tensor& input, const Tensor& saved,
                                         int64_t reduction) {
  using torch::headeronly::toString;
  const char* op = "cross_entropy_backward";
  const std::vector<int64_t> shape = reduction == kNone ? s.batch : std::vector<int64_t>{};
  bool fits = grad_loss.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = grad_loss.size(d) == shape[d];
  FASTCLS_CHECK(fits, op, ": grad_loss must have shape ", shape_string(shape), ", got ",
                shape_string(grad_loss));
  const ScalarType x = input.scalar_type(), g = grad_loss.scalar_type();
  FASTCLS_CHECK(g == x || (is_half(x) && g == ScalarType::Float), op, ": grad_loss must be ",
                toString(x), " like input", is_half(x) ? " or Float" : "", ", got ", toString(g));
  check_same_device(op, "grad_loss", grad_loss, input, "input");
  check_same_device(op, "saved", saved, input, "input");
  const int64_t rows = s.rows();
  FASTCLS_CHECK(saved.scalar_type() == accumulate_type(x) && saved.dim() == 1 &&
                    saved.size(0) == saved_numel(rows) && saved.is_contiguous(),
                op, ": saved must be the one that cross_entropy_forward saved (", saved_numel(rows),
                " contiguous ", toString(accumulate_type(x)), "), got ", shape_string(saved), " ",
                toString(saved.scalar_type()));
}

// Multiplies the gradient that the forward op has saved, of the mean or the sum over class indices.
inline CrossEntropyShape check_cross_entropy_scale(const Tensor& grad, const Tensor& grad_loss,
                                                   const Tensor& target, int64_t ignore_index) {
  using torch::headeronly::toString;
  const char* op = "cross_entropy_scale_";
  const CrossEntropyShape s =
      check_cross_entropy(op, grad, target, std::nullopt, ignore_index, kMean, 0);
  FASTCLS_CHECK(!s.prob, op, ": target must hold class indices, got probabilities");
  FASTCLS_CHECK(grad_loss.dim() == 0, op, ": grad_loss must have shape (), got ",
                shape_string(grad_loss));
  const ScalarType x = grad.scalar_type(), g = grad_loss.scalar_type();
  FASTCLS_CHECK(g == x || (is_half(x) && g == ScalarType::Float), op, ": grad_loss must be ",
                toString(x), " like grad", is_half(x) ? " or Float" : "", ", got ", toString(g));
  check_same_device(op, "grad_loss", grad_loss, grad, "grad");
  return s;
}

}  // namespace fastcls
