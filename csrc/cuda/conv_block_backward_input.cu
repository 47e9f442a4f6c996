// dX of a conv block as a matrix product, see conv_block_gemm.h: the convolution of the conv map's
// gradient with the mirrored weight. That gradient exists in shared memory only, where it is
// expanded from pooled gradient and winners.
#include "cuda/conv_block_expand.h"
#include "cuda/conv_block_gemm.h"

namespace fastcls::cuda {

namespace {

// The conv map's gradient as the product's operand.
template <typename Math>
struct GradSource {
  using Element = typename Math::Element;
  static constexpr bool kRounded = true;
  MapGrad<Element> grad;
  bool channels_inner;

  __device__ void load(const ConvBlockShape& s, unsigned char* to, int64_t n, int64_t k, int h,
                       int w, bool inside) const {
    grad.write(to, n, static_cast<int>(k), h, w, inside && k < s.C, Math::rounded, nullptr);
  }
};

// 32 columns: see backward_input_plan.
template <typename Math>
void launch_backward_input(const Launcher& launch, const ConvBlockShape& s, const GemmTile& tile,
                           const BackwardTensors& t) {
  using Element = typename Math::Element;
  const auto g = const_view<Element>(t.grad_out);
  const GradSource<Math> source{map_grad<Element>(s, g, t.codes), g.c <= g.w};
  // Columns are input channels, and the last tap comes first.
  const bool wide = t.weight.scalar_type() == ScalarType::Float;
  const int64_t last =
      (s.kernel_h - 1) * t.weight.stride(2) + (s.kernel_w - 1) * t.weight.stride(3);
  const char* data = static_cast<const char*>(t.weight.const_data_ptr());
  const GemmWeight weight{data + last * (wide ? sizeof(float) : sizeof(Element)),
                          wide,
                          t.weight.stride(1),
                          t.weight.stride(0),
                          -t.weight.stride(2),
                          -t.weight.stride(3)};
  const auto out = mutable_view<Element>(t.grad_input);
  launch_gemm<Math, 4, false>(
      launch, transposed(s), tile, source, weight, nullptr,
      GemmOutput<Element>{out, Codes{nullptr, false}, channels_are_paired(out, s.C)});
}

}  // namespace

void launch_gemm_backward_input(const Launcher& launch, const ConvBlockShape& s,
                                const GemmPlan& plan, Arithmetic a, const BackwardTensors& t) {
  dispatch_arithmetic(
      a, [&](auto math) { launch_backward_input<decltype(math)>(launch, s, plan.tile, t); });
}

}  // namespace fastcls::cuda
