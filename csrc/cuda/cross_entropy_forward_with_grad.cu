// Loss and gradient of cross_entropy from one read of the logits, on CUDA.
#include "cuda/cross_entropy_call.h"

namespace fastcls::cuda {

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

#define FASTCLS_INSTANTIATE(T)                                                                  \
  template void launch_forward_with_grad<T>(const Call&, const ForwardTile&,                    \
                                            const Problem<T, float>&, const Outputs<T, float>&, \
                                            const Tensor&);
FASTCLS_INSTANTIATE(float)
FASTCLS_INSTANTIATE(torch::headeronly::BFloat16)
FASTCLS_INSTANTIATE(torch::headeronly::Half)
#undef FASTCLS_INSTANTIATE

}  // namespace fastcls::cuda
