// conv_block on CUDA, the host functions: checks, allocation, and which kernels serve.
//
//   conv_block_patch.h           the patch of the input under a box of outputs, in shared memory
//   conv_block_gemm.h            forward pass and dX as matrix products; conv_block_forward.cu and
//                                conv_block_backward_input.cu have their operands
//   conv_block_store.h           pools and stores their sums
//   conv_block_backward_weight.cu   dW and db likewise
//   conv_block_general.cu        every argument and dtype
//
// Fused: convolution, bias, ReLU, max-pool and the winner's code. Never written to memory: the conv
// map, its gradient and casts of the operands. Sums are in a fixed order: no atomics.
#include "cuda/conv_block_kernels.h"

#include <limits>
#include <map>
#include <mutex>
#include <tuple>

namespace fastcls::cuda {

namespace {

Codes codes_of(const ConvBlockShape& s, const Tensor& winner) {
  return {winner.numel() ? winner.mutable_data_ptr() : nullptr, s.wide_winner()};
}

// Float operands are rounded to tf32 only where the caller allows it.
std::optional<Arithmetic> arithmetic_of(ScalarType type, bool allow_tf32, int arch) {
  switch (type) {
    case ScalarType::BFloat16:
      return Arithmetic::kBf16;
    case ScalarType::Half:
      return Arithmetic::kF16;
    case ScalarType::Float:
      if (!arch_has(Arithmetic::kTf32, arch)) return Arithmetic::kFloat;
      return allow_tf32 ? Arithmetic::kTf32 : Arithmetic::kTf32x3;
    default:
      return std::nullopt;
  }
}

// Do 32 bits hold the way from a box's first pixel, which may lie in the padding, to any other one
// of its images, rows and columns?
bool is_narrow(const Tensor& t, int64_t images, int64_t rows, int64_t columns) {
  const int64_t last = images * t.stride(0) + (t.size(1) + 1) * t.stride(1) + rows * t.stride(2) +
                       columns * t.stride(3);
  return last <= std::numeric_limits<int32_t>::max();
}

bool has_narrow_patches(const GemmTile& t, const Tensor& input) {
  return is_narrow(input, t.images, t.patch_h, t.patch_w);
}

// Few channels would fill a step of the sum with padding, where the pixels under a row of the
// kernel cannot be one run.
bool folds(const ConvBlockShape& s) { return s.C <= 8 && s.dilation_w == 1; }

GemmPlan plan_forward(const ConvBlockShape& s, Arithmetic a, int arch, int64_t max_shared) {
  return gemm_plan(s, a, folds(s), true, arch, max_shared);
}

GemmPlan plan_backward_input(const ConvBlockShape& s, Arithmetic a, int arch, int64_t max_shared) {
  if (s.stride_h != 1 || s.stride_w != 1) return {};
  return gemm_plan(transposed(s), a, false, false, arch, max_shared);
}

WeightGradPlan plan_backward_weight(const ConvBlockShape& s, Arithmetic a, int arch,
                                    int64_t max_shared) {
  return weight_grad_plan(s, a, folds(s), arch, max_shared);
}

// What kMake plans for the device, or no plan without an arithmetic. To make one takes up to 50 us,
// so that they are kept.
template <auto kMake>
auto plan_of(const Launcher& launch, const ConvBlockShape& s, std::optional<Arithmetic> a) {
  using Plan = decltype(kMake(s, *a, int{}, int64_t{}));
  constexpr size_t kMost = 1024;  // of half a KiB
  if (!a) return Plan{};
  static std::mutex mutex;
  static std::map<std::tuple<ConvBlockShape, Arithmetic, int, int64_t>, Plan> plans;
  const std::tuple key{s, *a, launch.arch(), launch.max_shared_bytes()};
  const std::lock_guard lock(mutex);
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  if (plans.size() == kMost) plans.clear();
  return plans[key] = kMake(s, *a, launch.arch(), launch.max_shared_bytes());
}

GemmPlan forward_plan(const Launcher& launch, const ConvBlockShape& s, const Tensor& input,
                      std::optional<Arithmetic> a) {
  const GemmPlan plan = plan_of<plan_forward>(launch, s, a);
  return plan.exists() && has_narrow_patches(plan.tile, input) ? plan : GemmPlan{};
}

GemmPlan backward_input_plan(const Launcher& launch, const ConvBlockShape& s,
                             const Tensor& grad_out, std::optional<Arithmetic> a) {
  const GemmPlan plan = plan_of<plan_backward_input>(launch, s, a);
  return plan.exists() && has_narrow_patches(plan.tile, grad_out) ? plan : GemmPlan{};
}

WeightGradPlan backward_weight_plan(const Launcher& launch, const ConvBlockShape& s,
                                    const Tensor& input, const Tensor& grad_out,
                                    std::optional<Arithmetic> a) {
  const WeightGradPlan plan = plan_of<plan_backward_weight>(launch, s, a);
  const GemmTile& t = plan.tile;
  const bool serves = plan.exists() && has_narrow_patches(t, input) &&
                      is_narrow(grad_out, t.images, t.box_h, t.box_w);
  return serves ? plan : WeightGradPlan{};
}

// dX reads vectors of neighbouring channels. Gradients from Flatten, of a sum or of tensors in
// PyTorch's default format would have it read channels one by one.
Tensor with_inner_channels(const Tensor& grad_out) {
  const bool vectors = grad_out.size(1) * grad_out.element_size() % 16 == 0;
  if (!vectors || grad_out.stride(1) == 1) return grad_out;
  return torch::stable::contiguous(grad_out, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace

int64_t conv_block_path(const Tensor& input, const Tensor& weight, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
                        std::vector<int64_t> pool_padding, bool ceil_mode, bool allow_tf32) {
  const ConvBlockShape s = check_conv_block(
      "conv_block_path", input, weight, std::nullopt,
      {stride, padding, dilation, groups, relu, pool_size, pool_stride, pool_padding, ceil_mode});
  const Launcher launch(input);
  const GemmPlan plan =
      forward_plan(launch, s, input, arithmetic_of(input.scalar_type(), allow_tf32, launch.arch()));
  return static_cast<int64_t>(!plan.exists()     ? ConvBlockPath::kGeneral
                              : plan.config.fold ? ConvBlockPath::kDirect
                                                 : ConvBlockPath::kGemm);
}

std::tuple<Tensor, Tensor> conv_block_forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
    std::vector<int64_t> pool_padding, bool ceil_mode, bool save_winner, bool allow_tf32) {
  const ConvBlockShape s = check_conv_block(
      "conv_block", input, weight, bias,
      {stride, padding, dilation, groups, relu, pool_size, pool_stride, pool_padding, ceil_mode});
  const Launcher launch(input);
  Tensor out =
      empty_4d(s.N, s.K, s.out_h, s.out_w, input.scalar_type(), gives_output_format(input, weight));
  Tensor winner = empty_winner(s, save_winner, input);
  if (s.out_numel() == 0) return {out, winner};
  // The kernel reads bias as one run of memory.
  const std::optional<Tensor> flat_bias =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  const ForwardTensors tensors{input, weight, flat_bias, out, codes_of(s, winner)};
  const auto arithmetic = arithmetic_of(input.scalar_type(), allow_tf32, launch.arch());
  const GemmPlan plan = forward_plan(launch, s, input, arithmetic);
  if (plan.exists())
    launch_gemm_forward(launch, s, plan, *arithmetic, tensors);
  else
    launch_general_forward(launch, s, tensors);
  return {out, winner};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& winner,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool relu, std::vector<int64_t> pool_size, std::vector<int64_t> pool_stride,
    std::vector<int64_t> pool_padding, bool ceil_mode, bool need_input, bool need_weight,
    bool need_bias, bool allow_tf32) {
  const ConvBlockShape s = check_conv_block(
      "conv_block_backward", input, weight, std::nullopt,
      {stride, padding, dilation, groups, relu, pool_size, pool_stride, pool_padding, ceil_mode});
  check_conv_block_backward(s, grad_out, input, winner);
  const Launcher launch(input);
  const ScalarType x_type = input.scalar_type(), w_type = weight.scalar_type();
  Tensor grad_input =
      need_input ? empty_4d(s.N, s.C, s.H, s.W, x_type, input) : empty_flat({0}, x_type, input);
  Tensor grad_weight = need_weight
                           ? empty_4d(s.K, s.group_in(), s.kernel_h, s.kernel_w, w_type, weight)
                           : empty_flat({0}, w_type, weight);
  Tensor grad_bias = empty_flat({need_bias ? s.K : 0}, w_type, weight);
  const auto arithmetic = arithmetic_of(x_type, allow_tf32, launch.arch());
  const GemmPlan input_plan =
      grad_input.numel() > 0 ? backward_input_plan(launch, s, grad_out, arithmetic) : GemmPlan{};
  const Tensor grads = input_plan.exists() ? with_inner_channels(grad_out) : grad_out;
  const BackwardTensors tensors{grads,      input,       weight,   codes_of(s, winner),
                                grad_input, grad_weight, grad_bias};
  if (input_plan.exists())
    launch_gemm_backward_input(launch, s, input_plan, *arithmetic, tensors);
  else if (grad_input.numel() > 0)
    launch_general_backward_input(launch, s, tensors);
  if (grad_weight.numel() > 0 || grad_bias.numel() > 0) {
    const WeightGradPlan plan = backward_weight_plan(launch, s, input, grads, arithmetic);
    if (plan.exists())
      launch_gemm_backward_weight(launch, s, plan, *arithmetic, tensors);
    else
      launch_general_backward_weight(launch, s, tensors);
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace fastcls::cuda
