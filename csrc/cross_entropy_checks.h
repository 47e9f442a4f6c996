// Checks of cross-entropy's arguments, and the sizes and strides that follow from them.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "cross_entropy.h"
#include "dtypes.h"
#include "tensors.h"

namespace fastcls {

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
  // fastcls/ops/cross_entropy.py turns "batch size" errors into ValueError, which no exception of
  // C++ does.
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
