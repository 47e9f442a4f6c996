// The gradient of cross_entropy on CUDA, from what the forward pass saved of each row, and its
// product with that of the loss.
#include "cuda/cross_entropy_call.h"

namespace fastcls::cuda {

namespace {

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

}  // namespace

void launch_cross_entropy_backward(const Call& call, const std::optional<Tensor>& grad_loss,
                                   const Tensor& saved, const Tensor& grad) {
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
  launch_cross_entropy_backward(
      call, grad_loss.is_contiguous() ? grad_loss : torch::stable::contiguous(grad_loss), saved,
      grad);
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
