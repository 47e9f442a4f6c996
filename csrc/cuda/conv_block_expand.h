// The gradient of the conv map for dX, expanded from pooled gradient and winners where it is
// needed. It is never written to memory.
#pragma once

#include "cuda/conv_block_kernels.h"

namespace fastcls::cuda {

template <typename T>
struct MapGrad {
  static constexpr int kSize = 16 / sizeof(T);  // channels at a time
  View4<const T> g;                             // pooled gradient [N, K, out_h, out_w]
  Codes codes;
  bool vectors;  // gradients and codes, of a byte each, of the channels lie in aligned vectors
  int K, out_h, out_w, pool_h, pool_w, step_h, step_w, pad_h, pad_w;

  // Writes `rounded` of channels [k, k + kSize) at position (h, w) of the map to `to`, aligned to
  // 16: zeros beyond the last channel, and everywhere unless `inside`.
  template <typename Rounded>
  __device__ void write(unsigned char* to, int64_t n, int k, int h, int w, bool inside,
                        const Rounded& rounded) const {
    if (vectors) {
      float sums[kSize] = {};
      if (inside) add_windows(n, k, h, w, sums);
      Vector v;
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.e[i] = rounded(sums[i]);
      *reinterpret_cast<Vector*>(to) = v;
      return;
    }
#pragma unroll 1  // as many loads at once as there are registers for
    for (int i = 0; i < kSize; ++i) {
      const float sum = inside && k + i < K ? sum_windows(n, k + i, h, w) : 0.0f;
      reinterpret_cast<T*>(to)[i] = rounded(sum);
    }
  }

  struct alignas(16) Vector {
    T e[kSize];
  };
  struct alignas(kSize) Places {
    uint8_t e[kSize];
  };

  // The edge of a window where windows tile the map and their positions are expanded together: 1 or
  // 2; else 0.
  int tiling() const {
    const bool square = pool_h == pool_w && step_h == pool_h && step_w == pool_h;
    const bool plain = square && pad_h == 0 && pad_w == 0 && vectors;
    if (!plain || pool_h > 2) return 0;
    return pool_h == 1 || codes.data ? pool_h : 0;
  }

  // Gradients and winners of channels [k, k + kSize) of one window.
  __device__ void read(int64_t n, int k, int ph, int pw, Vector& grads, Places& places) const {
    grads = *reinterpret_cast<const Vector*>(g.at(n, k, ph, pw));
    const int64_t first = ((n * out_h + ph) * out_w + pw) * K + k;
    places = codes.data
                 ? *reinterpret_cast<const Places*>(static_cast<const uint8_t*>(codes.data) + first)
                 : Places{};
  }

 private:
  // Calls f(offset of the window in codes over channels, ph, pw, place) for the windows over (h,
  // w).
  template <typename F>
  __device__ void for_windows(int64_t n, int h, int w, const F& f) const {
    const auto rows = windows_over(h, pool_h, step_h, pad_h, out_h);
    const auto columns = windows_over(w, pool_w, step_w, pad_w, out_w);
#pragma unroll 1  // one window most of the time
    for (int ph = rows.first; ph <= rows.last; ++ph)
#pragma unroll 1
      for (int pw = columns.first; pw <= columns.last; ++pw)
        f(((n * out_h + ph) * out_w + pw) * K, ph, pw,
          (h - ph * step_h + pad_h) * pool_w + w - pw * step_w + pad_w);
  }

  __device__ float sum_windows(int64_t n, int k, int h, int w) const {
    float sum = 0;
    for_windows(n, h, w, [&](int64_t first, int ph, int pw, int place) {
      if (codes.get(first + k) == place) sum += static_cast<float>(*g.at(n, k, ph, pw));
    });
    return sum;
  }

  __device__ void add_windows(int64_t n, int k, int h, int w, float (&sums)[kSize]) const {
    for_windows(n, h, w, [&](int64_t, int ph, int pw, int place) {
      Vector grads;
      Places places;
      read(n, k, ph, pw, grads, places);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (places.e[i] == place) sums[i] += static_cast<float>(grads.e[i]);
    });
  }
};

// The gradients of a window's channels that won at `place`, zeros for the others.
__device__ inline uint4 only_winners(const uint4& halves, const uint2& places, unsigned place) {
  const unsigned low = __vcmpeq4(places.x, place * 0x01010101u),
                 high = __vcmpeq4(places.y, place * 0x01010101u);
  return {halves.x & __byte_perm(low, 0, 0x1100), halves.y & __byte_perm(low, 0, 0x3322),
          halves.z & __byte_perm(high, 0, 0x1100), halves.w & __byte_perm(high, 0, 0x3322)};
}

__device__ inline uint4 only_winners(const uint4& floats, const unsigned& places, unsigned place) {
  const unsigned won = __vcmpeq4(places, place * 0x01010101u);
  return {floats.x & __byte_perm(won, 0, 0x0000), floats.y & __byte_perm(won, 0, 0x1111),
          floats.z & __byte_perm(won, 0, 0x2222), floats.w & __byte_perm(won, 0, 0x3333)};
}

template <typename T>
MapGrad<T> map_grad(const ConvBlockShape& s, const View4<const T>& g, const Codes& codes) {
  const auto in32 = [](int64_t size) { return static_cast<int>(size); };
  constexpr int64_t kSize = MapGrad<T>::kSize;
  const bool whole = s.K % kSize == 0 && g.n % kSize == 0 && g.h % kSize == 0 && g.w % kSize == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(g.data) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(codes.data) % kSize == 0;
  return {g,
          codes,
          g.c == 1 && whole && aligned && !codes.wide,
          in32(s.K),
          in32(s.out_h),
          in32(s.out_w),
          in32(s.pool_h),
          in32(s.pool_w),
          in32(s.pool_stride_h),
          in32(s.pool_stride_w),
          in32(s.pool_pad_h),
          in32(s.pool_pad_w)};
}

}  // namespace fastcls::cuda
