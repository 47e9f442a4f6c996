// What the files of the CUDA cross-entropy share: the call, and which kernels it takes.
//
//   cross_entropy_few.h      up to 32 classes, neighbours in memory: a thread to a row
//   cross_entropy_rows.h     more of them: a warp or a block to a row, read once in vectors
//   cross_entropy_general.h  everything else: strided classes, probabilities, float64, weights
//                            together with smoothing
#pragma once

#include <algorithm>

#include "cross_entropy_checks.h"
#include "cuda/common.h"
#include "cuda/cross_entropy_few.h"
#include "cuda/cross_entropy_general.h"
#include "cuda/cross_entropy_rows.h"
#include "dtypes.h"

namespace fastcls::cuda {

enum class Path { kFew, kRows, kGeneral };

// At most so many blocks, so that the last one has little to add up.
constexpr int64_t kMostBlocks = 1024;

// Rows of a block of which `at_once` are worked on at a time.
inline int64_t rows_per_block(int64_t rows, int64_t at_once) {
  const int64_t turns = (rows + at_once * kMostBlocks - 1) / (at_once * kMostBlocks);
  return std::max<int64_t>(turns, 1) * at_once;
}
inline int64_t blocks_for(int64_t rows, int64_t per_block) {
  return (rows + per_block - 1) / per_block;
}

// Threads to a row of the general kernels: 1 where a row is short, or where neighbouring rows and
// not neighbouring classes lie side by side in memory; a warp up to the length at which each lane
// has 64 classes; else a block.
inline int general_group(const RowLayout& layout) {
  if (layout.C <= 16 || layout.class_stride[kInput] != 1) return 1;
  return layout.C <= 64 * kWarpSize ? kWarpSize : kThreads;
}

// Threads to a row of so many vectors: up to 4 a thread, then up to 16, as small blocks keep each
// other's memory busy while they wait for their own threads; 512 for all above that.
inline int rows_group(int64_t vectors) {
  for (int group : {32, 128})
    if (vectors <= kBatch * group) return group;
  return vectors <= 4 * kBatch * 256 ? 256 : 512;
}

inline Path path_of(const RowLayout& layout, const CrossEntropyShape& s, ScalarType type,
                    bool weighted, double smoothing) {
  const bool plain_rows = layout.dims <= 1 && layout.class_stride[kInput] == 1;
  if (type == ScalarType::Double || s.prob || !plain_rows || (weighted && smoothing > 0))
    return Path::kGeneral;
  constexpr int64_t kMost = 1 << 30;  // rows and classes are counted in ints
  if (layout.C < 1 || layout.C > kMost || layout.rows > kMost) return Path::kGeneral;
  return layout.C <= kMostFewClasses ? Path::kFew : Path::kRows;
}

inline uintptr_t address(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr());
}

// Does each row of the gradient start at the same place within a vector as that of the logits?
inline bool aligned_alike(const RowLayout& layout, const Tensor& input, const Tensor& grad) {
  const int64_t bytes = input.element_size();
  const int64_t apart = layout.row_stride(kInput) - layout.row_stride(kGrad);
  return layout.class_stride[kGrad] == 1 && (address(input) - address(grad)) % 16 == 0 &&
         apart * bytes % 16 == 0;
}

// The largest power of 2, up to 16, that the rows' length, distance and addresses are multiples of.
inline int piece_bytes(const RowLayout& layout, const Tensor& input, const Tensor* grad) {
  const int64_t bytes = input.element_size();
  uintptr_t all = address(input) | layout.C * bytes | layout.row_stride(kInput) * bytes | 16;
  if (grad) all |= address(*grad) | layout.row_stride(kGrad) * bytes;
  return static_cast<int>(all & -all);
}

// ---- from dtypes and sizes to kernels

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls f with the one of kValues that is `value`, as a constant; with the last one if none is.
template <int kFirst, int... kValues, typename F>
void dispatch_int(int value, const F& f) {
  if constexpr (sizeof...(kValues) > 0)
    if (value != kFirst) return dispatch_int<kValues...>(value, f);
  f(Constant<kFirst>{});
}

template <typename F>
void dispatch_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

// The call as the kernels see it.
template <typename T, typename Acc>
Problem<T, Acc> make_problem(const RowLayout& layout, const CrossEntropyShape& s,
                             const Tensor& input, const Tensor& target,
                             const std::optional<Tensor>& weight, int64_t ignore_index,
                             double smoothing) {
  Problem<T, Acc> problem{};
  problem.layout = layout;
  problem.x = static_cast<const T*>(input.const_data_ptr());
  problem.target = target.const_data_ptr();
  problem.target_type = target.scalar_type();
  problem.prob = s.prob;
  problem.wide_prob = target.scalar_type() == accumulate_type(input.scalar_type());
  if (weight) {
    problem.weight = weight->const_data_ptr();
    problem.weight_stride = weight->stride(0);
    problem.wide_weight = weight->scalar_type() == accumulate_type(input.scalar_type());
  }
  problem.ignore_index = ignore_index;
  problem.keep = static_cast<Acc>(1 - smoothing);
  problem.spread = s.C == 0 ? Acc(0) : static_cast<Acc>(smoothing / s.C);
  return problem;
}

// A tensor's data if it has this dtype, else null: kernels take one pointer per dtype of the loss.
template <typename T>
T* data_if(const Tensor& t, bool matches) {
  return matches ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// Index targets are read flat; probabilities through their strides.
inline Tensor flat_target(const CrossEntropyShape& s, const Tensor& target) {
  return s.prob || target.is_contiguous() ? target : torch::stable::contiguous(target);
}

// One op's tensors and numbers.
struct Call {
  const char* op;
  const CrossEntropyShape& s;
  const Tensor& input;
  const Tensor& target;  // flat
  const std::optional<Tensor>& weight;
  int64_t ignore_index, reduction;
  double smoothing;
  const Launcher& launch;

  ScalarType type() const { return input.scalar_type(); }
  RowLayout layout(const Tensor* grad) const {
    return row_layout(op, s, {&input, s.prob ? &target : nullptr, grad});
  }
  Path path(const RowLayout& layout) const {
    return path_of(layout, s, type(), weight.has_value(), smoothing);
  }
  template <typename T, typename Acc>
  Problem<T, Acc> problem(const RowLayout& layout) const {
    return make_problem<T, Acc>(layout, s, input, target, weight, ignore_index, smoothing);
  }
};

// The gradient of the logits, written into `grad`; that of a result whose own gradient is 1 where
// grad_loss is missing.
void launch_cross_entropy_backward(const Call& call, const std::optional<Tensor>& grad_loss,
                                   const Tensor& saved, const Tensor& grad);

// Threads to a row, and rows to a block, of the forward pass. Vectors that a block's threads do not
// hold are read twice where the gradient is written: the longest rows get the largest block.
struct ForwardTile {
  Path path;
  bool grad;  // written by the forward kernel itself
  int group;
  int64_t chunk, blocks;
};

// Loss and gradient from one read of the logits, for T of float, BFloat16 and Half.
template <typename T>
void launch_forward_with_grad(const Call& call, const ForwardTile& tile,
                              const Problem<T, float>& problem, const Outputs<T, float>& out,
                              const Tensor& grad);

}  // namespace fastcls::cuda
