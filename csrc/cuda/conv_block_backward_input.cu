// dX of a conv block as a matrix product, see conv_block_gemm.h: the convolution of the conv map's
// gradient with the mirrored weight. That gradient exists in shared memory only, where it is
// expanded from pooled gradient and winners.
#include <type_traits>

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
  NarrowView<const Element> g;  // its pooled gradient
  bool channels_inner;
  int tiling;                          // see MapGrad
  Divider by_windows_h, by_windows_w;  // as many as a patch can touch
  int image_codes;                     // of one image

  __device__ void load_patch(const ConvBlockShape& s, const GemmTile& t, unsigned char* patch,
                             const Box& box, int chunk) const {
    if (tiling == 2)
      load_windows<2>(s, t, patch, box, chunk);
    else if (tiling == 1)
      load_windows<1>(s, t, patch, box, chunk);
    else
      load_positions(s, t, patch, box, chunk);
  }

 private:
  __device__ void load_positions(const ConvBlockShape& s, const GemmTile& t, unsigned char* patch,
                                 const Box& box, int chunk) const {
    const unsigned items = t.pixels * t.by_vectors.divisor;
#pragma unroll 1  // the sums take most registers, and an item's own loads are many
    for (unsigned i = threadIdx.x; i < items; i += blockDim.x) {
      const PatchItem item = patch_item(t, channels_inner, i);
      const PatchEntry at = patch_entry(t, item.pixel);
      const int k = chunk * t.channels + item.vector * MapGrad<Element>::kSize;
      grad.write(patch + at.to + item.vector * 16, box.n + at.image, k, box.h + at.y(),
                 box.w + at.x(), is_inside(s, box, at) && k < s.C, Math::rounded);
    }
  }

  // 16 bytes of channels of one window.
  struct Window {
    typename MapGrad<Element>::Vector grads;
    typename MapGrad<Element>::Places places;
    int y, x;           // of its first position in the patch
    unsigned char* to;  // where these channels lie at (0, 0)
  };

  // All windows that a patch touches, zeros for those that do not exist: every position of the
  // patch is written once. A window's four positions share its loads, and the loads of a few are on
  // their way together.
  template <int kEdge>
  __device__ void load_windows(const ConvBlockShape& s, const GemmTile& t, unsigned char* patch,
                               const Box& box, int chunk) const {
    // What registers allow beside 64 columns of sums.
    constexpr int kTogether = Layout<Math>::kMatrixUnit && sizeof(Element) == 4 ? 1 : 2;
    const unsigned items = t.images * by_windows_h.divisor * by_windows_w.divisor *
                           static_cast<int>(t.by_vectors.divisor);
#pragma unroll 1
    for (unsigned item = threadIdx.x; item < items; item += kTogether * blockDim.x) {
      Window windows[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        windows[i] = read<kEdge>(s, t, patch, box, chunk, item + i * blockDim.x);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (item + i * blockDim.x < items) write<kEdge>(t, windows[i]);
    }
  }

  template <int kEdge>
  __device__ Window read(const ConvBlockShape& s, const GemmTile& t, unsigned char* patch,
                         const Box& box, int chunk, unsigned item) const {
    constexpr int kShift = kEdge - 1;
    const int vector = split(item, t.by_vectors);
    const int pw = (box.w >> kShift) + split(item, by_windows_w);
    const int ph = (box.h >> kShift) + split(item, by_windows_h);
    const int image = static_cast<int>(item), n = box.n + image;
    const int k = chunk * t.channels + vector * MapGrad<Element>::kSize;
    Window window{};
    window.y = ph * kEdge - box.h, window.x = pw * kEdge - box.w;
    window.to = patch + image * t.image_bytes + vector * 16;
    if (image >= t.images || n >= static_cast<int>(s.N) ||
        static_cast<unsigned>(ph) >= static_cast<unsigned>(grad.out_h) ||
        static_cast<unsigned>(pw) >= static_cast<unsigned>(grad.out_w) ||
        k >= static_cast<int>(s.C))
      return window;
    window.grads = *reinterpret_cast<const typename MapGrad<Element>::Vector*>(g.at(n, k, ph, pw));
    if (grad.codes.data)
      window.places = *reinterpret_cast<const typename MapGrad<Element>::Places*>(
          static_cast<const uint8_t*>(grad.codes.data) +
          (static_cast<int64_t>(n) * image_codes + (ph * grad.out_w + pw) * grad.K + k));
    return window;
  }

  template <int kEdge>
  __device__ void write(const GemmTile& t, Window& window) const {
    using PlaceWords = std::conditional_t<sizeof(window.places) == 8, uint2, unsigned>;
    if constexpr (sizeof(Element) == 4)
      for (Element& e : window.grads.e) e = Math::rounded(e);
    const auto grads = bits_as<uint4>(window.grads);
    const auto places = bits_as<PlaceWords>(window.places);
#pragma unroll
    for (int place = 0; place < kEdge * kEdge; ++place) {
      const int y = window.y + place / kEdge, x = window.x + place % kEdge;
      if (y < 0 || y >= t.patch_h || x < 0 || x >= t.patch_w) continue;
      *reinterpret_cast<uint4*>(window.to + y * t.row_bytes + x * t.pixel_bytes) =
          only_winners(grads, places, place);
    }
  }
};

template <typename Math>
GradSource<Math> grad_source(const ConvBlockShape& s, const GemmTile& tile,
                             const BackwardTensors& t) {
  using Element = typename Math::Element;
  const auto g = const_view<Element>(t.grad_out);
  const auto grad = map_grad<Element>(s, g, t.codes);
  const int64_t edge = std::max(grad.tiling(), 1);
  return {grad,
          narrowed(g),
          g.c <= g.w,
          grad.tiling(),
          Divider(ceil_div(tile.patch_h - 1, edge) + 1),
          Divider(ceil_div(tile.patch_w - 1, edge) + 1),
          static_cast<int>(s.out_h * s.out_w * s.K)};
}

template <typename Math, int kTilesN>
void launch_backward_input(const Launcher& launch, const ConvBlockShape& s, const GemmTile& tile,
                           const BackwardTensors& t) {
  using Element = typename Math::Element;
  // Columns are input channels, and the last tap comes first.
  const bool wide = t.weight.scalar_type() == ScalarType::Float;
  const int64_t last =
      (s.kernel_h - 1) * t.weight.stride(2) + (s.kernel_w - 1) * t.weight.stride(3);
  const char* data = static_cast<const char*>(t.weight.const_data_ptr());
  const GemmWeight weight{{data + last * (wide ? sizeof(float) : sizeof(Element)), wide},
                          t.weight.stride(1),
                          t.weight.stride(0),
                          -t.weight.stride(2),
                          -t.weight.stride(3)};
  launch_gemm<Math, kTilesN, false>(
      launch, transposed(s), tile, grad_source<Math>(s, tile, t), weight, nullptr,
      gemm_output<kTilesN, Element>(t.grad_input, Codes{nullptr, false}, s.C), t.input);
}

template <typename Math>
void launch_backward_input(const Launcher& launch, const ConvBlockShape& s, const GemmPlan& plan,
                           const BackwardTensors& t) {
  dispatch_columns<Math>(plan.config.columns, [&](auto tiles) {
    launch_backward_input<Math, decltype(tiles)::value>(launch, s, plan.tile, t);
  });
}

}  // namespace

void launch_gemm_backward_input(const Launcher& launch, const ConvBlockShape& s,
                                const GemmPlan& plan, Arithmetic a, const BackwardTensors& t) {
  dispatch_arithmetic(
      a, [&](auto math) { launch_backward_input<decltype(math)>(launch, s, plan, t); });
}

}  // namespace fastcls::cuda
