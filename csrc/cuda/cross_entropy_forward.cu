// cross_entropy on CUDA: check, allocate, pick a kernel, launch.
//
// Fused: log-softmax, the target's weights, smoothing, ignored rows, hits and the reduction. Never
// written to memory: probabilities, log-probabilities, one-hot targets, casts of the logits. The
// maths is in cpu/cross_entropy_general.h.
//
// Rows are summed in an order that depends on the shape alone, without atomics on numbers that are
// not counts. A class index outside [0, C) is never used as an address: it makes its row's loss and
// gradient NaN. Finding out on the host would make the host wait.
#include "cuda/cross_entropy_call.h"

namespace fastcls::cuda {

namespace {

// The same where many rows are only read: fewer threads with up to 32 vectors each, as a row costs
// each of its warps some 230 instructions whatever its length, as many as 40 classes do. All rows
// together are still to have the threads that the multiprocessors hold at a time, 1024 each.
int forward_group(int64_t vectors, int64_t rows) {
  for (int group : {32, 128, 256})
    if (vectors <= 32 * group && rows * group >= 128 * 1024) return group;
  return rows_group(vectors);
}

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
  if (save == kSaveGrad && !tile.grad)
    launch_cross_entropy_backward(call, std::nullopt, rows, grad);
  return {loss, save == kSaveGrad ? grad : rows, hits};
}

}  // namespace fastcls::cuda
