// cross_entropy on CUDA: check, allocate, pick a kernel, launch.
//
// Fused: log-softmax, the target's weights, smoothing, ignored rows, hits and the reduction. Never
// written to memory: probabilities, log-probabilities, one-hot targets, casts of the logits. The
// maths is in cpu/cross_entropy_general.h.
//
//   cross_entropy_few.h      up to 32 classes, neighbours in memory: a thread to a row
//   cross_entropy_rows.h     more of them: a warp or a block to a row, read once in vectors
//   cross_entropy_general.h  everything else: strided classes, probabilities, float64, weights
//                            together with smoothing
//
// Rows are summed in an order that depends on the shape alone, without atomics on numbers that are
// not counts. A class index outside [0, C) is never used as an address: it makes its row's loss and
// gradient NaN. Finding out on the host would make the host wait.
#include <algorithm>
#include <cstring>

#include "cuda/common.h"
#include "cuda/cross_entropy_few.h"
#include "cuda/cross_entropy_general.h"
#include "cuda/cross_entropy_rows.h"
#include "dtypes.h"

namespace fastcls::cuda {

namespace {

enum class Path { kFew, kRows, kGeneral };

// At most so many blocks, so that the last one has little to add up.
constexpr int64_t kMostBlocks = 1024;

// Rows of a block of which `at_once` are worked on at a time.
int64_t rows_per_block(int64_t rows, int64_t at_once) {
  const int64_t turns = (rows + at_once * kMostBlocks - 1) / (at_once * kMostBlocks);
  return std::max<int64_t>(turns, 1) * at_once;
}
int64_t blocks_for(int64_t rows, int64_t per_block) { return (rows + per_block - 1) / per_block; }

// Threads to a row of the general kernels: 1 where a row is short, or where neighbouring rows and
// not neighbouring classes lie side by side in memory; a warp up to the length at which each lane
// has 64 classes; else a block.
int general_group(const RowLayout& layout) {
  if (layout.C <= 16 || layout.class_stride[kInput] != 1) return 1;
  return layout.C <= 64 * kWarpSize ? kWarpSize : kThreads;
}

// Threads to a row of so many vectors: up to 4 a thread, then up to 16, as small blocks keep each
// other's memory busy while they wait for their own threads; 512 for all above that.
int rows_group(int64_t vectors) {
  for (int group : {32, 128})
    if (vectors <= kBatch * group) return group;
  return vectors <= 4 * kBatch * 256 ? 256 : 512;
}

// The same where many rows are only read: fewer threads with up to 32 vectors each, as a row costs
// each of its warps some 230 instructions whatever its length, as many as 40 classes do. All rows
// together are still to have the threads that the multiprocessors hold at a time, 1024 each.
int forward_group(int64_t vectors, int64_t rows) {
  for (int group : {32, 128, 256})
    if (vectors <= 32 * group && rows * group >= 128 * 1024) return group;
  return rows_group(vectors);
}

Path path_of(const RowLayout& layout, const CrossEntropyShape& s, ScalarType type, bool weighted,
             double smoothing) {
  const bool plain_rows = layout.dims <= 1 && layout.class_stride[kInput] == 1;
  if (type == ScalarType::Double || s.prob || !plain_rows || (weighted && smoothing > 0))
    return Path::kGeneral;
  constexpr int64_t kMost = 1 << 30;  // rows and classes are counted in ints
  if (layout.C < 1 || layout.C > kMost || layout.rows > kMost) return Path::kGeneral;
  return layout.C <= kMostFewClasses ? Path::kFew : Path::kRows;
}

uintptr_t address(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); }

// Does each row of the gradient start at the same place within a vector as that of the logits?
bool aligned_alike(const RowLayout& layout, const Tensor& input, const Tensor& grad) {
  const int64_t bytes = input.element_size();
  const int64_t apart = layout.row_stride(kInput) - layout.row_stride(kGrad);
  return layout.class_stride[kGrad] == 1 && (address(input) - address(grad)) % 16 == 0 &&
         apart * bytes % 16 == 0;
}

// The largest power of 2, up to 16, that the rows' length, distance and addresses are multiples of.
int piece_bytes(const RowLayout& layout, const Tensor& input, const Tensor* grad) {
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

template <typename T, typename Acc>
Scale<T, Acc> make_scale(const std::optional<Tensor>& grad_loss, bool each, const Acc* divisor) {
  Scale<T, Acc> scale{nullptr, nullptr, each, divisor};
  if (!grad_loss) return scale;
  const ScalarType type = grad_loss->scalar_type();
  const bool wide = type == accumulate_type(type);  // float logits: T and Acc are the same
  const void* data = grad_loss->const_data_ptr();
  if (wide) scale.wide_grad_loss = static_cast<const Acc*>(data);
  if (!wide) scale.grad_loss = static_cast<const T*>(data);
  return scale;
}

// Index targets are read flat; probabilities through their strides.
Tensor flat_target(const CrossEntropyShape& s, const Tensor& target) {
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

// ---- launchers

// The gradient of the logits, written into `grad`; that of a result whose own gradient is 1 where
// grad_loss is missing.
void launch_backward(const Call& call, const std::optional<Tensor>& grad_loss, const Tensor& saved,
                     const Tensor& grad) {
  if (grad.numel() == 0) return;
  const RowLayout layout = call.layout(&grad);
  const int64_t rows = layout.rows;
  Path path = call.path(layout);
  if (path == Path::kRows && !aligned_alike(layout, call.input, grad)) path = Path::kGeneral;
  if (path == Path::kFew && layout.class_stride[kGrad] != 1) path = Path::kGeneral;
  dispatch_types(call.type(), call.type(), [&](auto t, auto, auto acc) {
    using T = decltype(t);
    using Acc = decltype(acc);
    const Problem<T, Acc> problem = call.problem<T, Acc>(layout);
    const Acc* save = static_cast<const Acc*>(saved.const_data_ptr());
    T* to = static_cast<T*>(grad.mutable_data_ptr());
    const Scale<T, Acc> scale = make_scale<T, Acc>(
        grad_loss, call.reduction == kNone, call.reduction == kMean ? save + 2 * rows : nullptr);
    if constexpr (std::is_same_v<Acc, float>) {
      if (path == Path::kFew)
        return dispatch_int<16, 32>(layout.C <= 16 ? 16 : 32, [&](auto most) {
          call.launch(few_backward_kernel<T, decltype(most)::value>,
                      dim3(blocks_for(rows, kFewThreads)), kFewThreads, problem,
                      piece_bytes(layout, call.input, &grad), save, scale, to);
        });
      if (path == Path::kRows)
        return dispatch_int<32, 128, 256, 512>(
            rows_group(layout.C * sizeof(T) / 16), [&](auto group) {
              constexpr int kGroup = decltype(group)::value, kBlock = kRowsThreads<kGroup>;
              call.launch(rows_backward_kernel<T, kGroup>, dim3(blocks_for(rows, kBlock / kGroup)),
                          kBlock, problem, save, scale, to);
            });
    }
    const int group = general_group(layout);
    const int64_t chunk = rows_per_block(rows, kThreads / group);
    dispatch_int<1, kWarpSize, kThreads>(group, [&](auto threads) {
      call.launch(general_backward_kernel<T, Acc, decltype(threads)::value>,
                  dim3(blocks_for(rows, chunk)), kThreads, problem, chunk, save, scale, to);
    });
  });
}

// Threads to a row, and rows to a block, of the forward pass. Vectors that a block's threads do not
// hold are read twice where the gradient is written: the longest rows get the largest block.
struct ForwardTile {
  Path path;
  bool grad;  // written by the forward kernel itself
  int group;
  int64_t chunk, blocks;
};

ForwardTile forward_tile(const Call& call, const RowLayout& layout, const Tensor* grad) {
  ForwardTile tile{call.path(layout), false, 1, 0, 0};
  int64_t at_once = 0;
  if (tile.path == Path::kFew) {
    at_once = kFewThreads;
  } else if (tile.path == Path::kRows) {
    const int64_t vectors = layout.C * call.input.element_size() / 16;
    tile.grad = grad && aligned_alike(layout, call.input, *grad);
    if (!tile.grad)
      tile.group = forward_group(vectors, layout.rows);
    else
      tile.group = vectors > 16 * 512 ? 1024 : rows_group(vectors);
    at_once = tile.group == kWarpSize ? kRowsThreads<kWarpSize> / kWarpSize : 1;
  } else {
    tile.group = general_group(layout);
    at_once = kThreads / tile.group;
  }
  tile.chunk = rows_per_block(layout.rows, at_once);
  tile.blocks = blocks_for(layout.rows, tile.chunk);
  return tile;
}

template <typename T, typename Acc>
void launch_forward(const Call& call, const ForwardTile& tile, const Problem<T, Acc>& problem,
                    const Outputs<T, Acc>& out) {
  const dim3 blocks(tile.blocks);
  if constexpr (std::is_same_v<Acc, float>) {
    if (tile.path == Path::kFew) {
      const int pieces = piece_bytes(problem.layout, call.input, nullptr);
      return dispatch_int<16, 32>(problem.layout.C <= 16 ? 16 : 32, [&](auto most) {
        call.launch(few_forward_kernel<T, decltype(most)::value>, blocks, kFewThreads, problem,
                    tile.chunk, pieces, out);
      });
    }
    if (tile.path == Path::kRows)
      return dispatch_bool(out.hits || problem.spread > 0, [&](auto extras) {
        dispatch_int<32, 128, 256, 512>(tile.group, [&](auto group) {
          constexpr int kGroup = decltype(group)::value;
          call.launch(rows_forward_kernel<T, kGroup, decltype(extras)::value, false>, blocks,
                      kRowsThreads<kGroup>, problem, static_cast<int>(tile.chunk), out,
                      GradientOutput<T>{});
        });
      });
  }
  dispatch_int<1, kWarpSize, kThreads>(tile.group, [&](auto group) {
    call.launch(general_forward_kernel<T, Acc, decltype(group)::value>, blocks, kThreads, problem,
                tile.chunk, out);
  });
}

// Loss and gradient from one read of the logits.
template <typename T>
void launch_forward_with_grad(const Call& call, const ForwardTile& tile,
                              const Problem<T, float>& problem, const Outputs<T, float>& out,
                              const Tensor& grad) {
  // Some 4096 targets to a block that counts, and few enough of them for every block to add up.
  const int parts = static_cast<int>(std::clamp<int64_t>(problem.layout.rows / 4096, 1, 32));
  const bool divide = call.reduction == kMean;
  const Tensor weights = divide ? empty_flat({parts}, ScalarType::Double, call.input) : no_tensor();
  GradientOutput<T> output{static_cast<T*>(grad.mutable_data_ptr()),
                           data_if<double>(weights, divide), parts, 0};
  if (divide)
    call.launch(count_kernel<T>, dim3(parts), kCountThreads, problem,
                data_if<double>(weights, true));
  dispatch_bool(out.hits || problem.spread > 0, [&](auto extras) {
    dispatch_int<32, 128, 256, 512, 1024>(tile.group, [&](auto group) {
      constexpr int kGroup = decltype(group)::value;
      constexpr int kBlock = kRowsThreads<kGroup>, kSlot = kBlock * 16;
      const int64_t vectors = problem.layout.C * sizeof(T) / 16;
      const int64_t left = std::max<int64_t>(vectors - kBatch * kGroup, 0);
      output.stash = static_cast<int>(std::min<int64_t>(
          blocks_for(left, kGroup), (call.launch.max_shared_bytes() - 8192) / kSlot));
      call.launch.with_shared(
          output.stash * kSlot, rows_forward_kernel<T, kGroup, decltype(extras)::value, true>,
          dim3(tile.blocks), kBlock, problem, static_cast<int>(tile.chunk), out, output);
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target,
                                                         const std::optional<Tensor>& weight,
                                                         int64_t ignore_index, int64_t reduction,
                                                         double label_smoothing, bool float_loss,
                                                         int64_t save, bool count_hits) {
  const char* op = "cross_entropy";
  const CrossEntropyShape s =
      check_cross_entropy(op, input, target, weight, ignore_index, reduction, label_smoothing);
  check_cross_entropy_outputs(op, s, save, count_hits);
  const ScalarType type = input.scalar_type();
  const ScalarType loss_type = float_loss ? accumulate_type(type) : type;
  const bool wide_loss = loss_type == accumulate_type(type), each = reduction == kNone;
  const Tensor flat = flat_target(s, target);
  const Launcher launch(input);
  const Call call{
      op,    s, input, flat, weight, ignore_index, reduction, effective_smoothing(label_smoothing),
      launch};
  const Tensor grad = save == kSaveGrad ? new_like(input) : no_tensor();
  const RowLayout layout = call.layout(save == kSaveGrad ? &grad : nullptr);
  const ForwardTile tile = forward_tile(call, layout, save == kSaveGrad ? &grad : nullptr);
  // Without logits every sum is 0 and every mean NaN, as in PyTorch.
  const int64_t blocks = layout.C == 0 && !each ? 0 : tile.blocks;
  const bool save_rows = save == kSaveRows || (save == kSaveGrad && !tile.grad);

  Tensor loss = empty_flat(each ? s.batch : std::vector<int64_t>{}, loss_type, input);
  const Tensor rows = empty_saved(save_rows ? kSaveRows : kSaveNothing, layout.rows, input);
  const Tensor hits = empty_hits(count_hits, input);
  const bool sums = !each || count_hits, several = sums && blocks > 1;
  constexpr int64_t kSumsDoubles = sizeof(Sums) / sizeof(double);
  const Tensor of_block =
      several ? empty_flat({kSumsDoubles * blocks}, ScalarType::Double, input) : no_tensor();
  dispatch_types(type, type, [&](auto t, auto, auto acc) {
    using T = decltype(t);
    using Acc = decltype(acc);
    const Outputs<T, Acc> out{data_if<Acc>(rows, save_rows),
                              each,
                              reduction == kMean,
                              data_if<T>(loss, !wide_loss),
                              data_if<Acc>(loss, wide_loss),
                              data_if<int64_t>(hits, count_hits),
                              sums,
                              data_if<Sums>(of_block, several),
                              several ? launch.counter() : nullptr};
    if (blocks > 0) {
      const Problem<T, Acc> problem = call.problem<T, Acc>(layout);
      if constexpr (std::is_same_v<Acc, float>)
        if (tile.grad) launch_forward_with_grad<T>(call, tile, problem, out, grad);
      if (!tile.grad) launch_forward(call, tile, problem, out);
    }
    if (blocks == 0 ? sums || save_rows : several && !out.counter)
      launch(finish_kernel<T, Acc>, dim3(1), kFinishThreads, out, blocks, layout.rows);
  });
  if (save == kSaveGrad && !tile.grad) launch_backward(call, std::nullopt, rows, grad);
  return {loss, save == kSaveGrad ? grad : rows, hits};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              const std::optional<Tensor>& weight, const Tensor& saved,
                              int64_t ignore_index, int64_t reduction, double label_smoothing) {
  const char* op = "cross_entropy_backward";
  const CrossEntropyShape s =
      check_cross_entropy(op, input, target, weight, ignore_index, reduction, label_smoothing);
  check_cross_entropy_backward(s, grad_loss, input, saved, reduction);
  const Tensor flat = flat_target(s, target), grad = new_like(input);
  const Launcher launch(input);
  const Call call{
      op,    s, input, flat, weight, ignore_index, reduction, effective_smoothing(label_smoothing),
      launch};
  launch_backward(call,
                  grad_loss.is_contiguous() ? grad_loss : torch::stable::contiguous(grad_loss),
                  saved, grad);
  return grad;
}

void cross_entropy_scale(const Tensor& grad, const Tensor& grad_loss, const Tensor& target,
                         int64_t ignore_index) {
  const CrossEntropyShape s = check_cross_entropy_scale(grad, grad_loss, target, ignore_index);
  if (grad.numel() == 0) return;
  const RowLayout layout = row_layout("cross_entropy_scale_", s, {&grad, nullptr, &grad});
  const Tensor flat = flat_target(s, target);
  const Launcher launch(grad);
  dispatch_types(grad.scalar_type(), grad.scalar_type(), [&](auto t, auto, auto acc) {
    using T = decltype(t);
    using Acc = decltype(acc);
    launch(scale_kernel<T, Acc>, dim3(std::min<int64_t>(layout.rows, kScaleBlocks)), kScaleThreads,
           make_problem<T, Acc>(layout, s, grad, flat, std::nullopt, ignore_index, 0),
           make_scale<T, Acc>(grad_loss, false, nullptr), static_cast<T*>(grad.mutable_data_ptr()));
  });
}

}  // namespace fastcls::cuda
