// The forward pass of a conv block as a matrix product, see conv_block_gemm.h.
#include "cuda/conv_block_gemm.h"

namespace fastcls::cuda {

namespace {

template <typename Math, int kTilesN, bool kFold>
void launch_forward(const Launcher& launch, const ConvBlockShape& s, const GemmTile& tile,
                    const ForwardTensors& t) {
  using Element = typename Math::Element;
  const auto x = const_view<Element>(t.input);
  const auto source = input_source<Math>(x, s.C);
  const GemmWeight weight{{t.weight.const_data_ptr(), t.weight.scalar_type() == ScalarType::Float},
                          t.weight.stride(0),
                          t.weight.stride(1),
                          t.weight.stride(2),
                          t.weight.stride(3)};
  launch_gemm<Math, kTilesN, kFold>(launch, s, tile, source, weight,
                                    t.bias ? t.bias->const_data_ptr() : nullptr,
                                    gemm_output<kTilesN, Element>(t.out, t.codes, s.K), t.input);
}

template <typename Math>
void launch_forward(const Launcher& launch, const ConvBlockShape& s, const GemmPlan& plan,
                    const ForwardTensors& t) {
  dispatch_columns<Math>(plan.config.columns, [&](auto tiles) {
    constexpr int kTilesN = decltype(tiles)::value;
    if (plan.config.fold)
      launch_forward<Math, kTilesN, true>(launch, s, plan.tile, t);
    else
      launch_forward<Math, kTilesN, false>(launch, s, plan.tile, t);
  });
}

}  // namespace

void launch_gemm_forward(const Launcher& launch, const ConvBlockShape& s, const GemmPlan& plan,
                         Arithmetic a, const ForwardTensors& t) {
  dispatch_arithmetic(a, [&](auto math) { launch_forward<decltype(math)>(launch, s, plan, t); });
}

}  // namespace fastcls::cuda
