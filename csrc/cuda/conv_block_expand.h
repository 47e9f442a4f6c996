// The gradient of the conv map, expanded from pooled gradient and winners where it is needed. It is
// never written to memory.
#pragma once

#include "cuda/conv_block_kernels.h"

namespace fastcls::cuda {

template <typename T>
struct MapGrad {
  static constexpr int kSize = 16 / sizeof(T);  // channels at a time
  View4<const T> g;                             // pooled gradient [N, K, out_h, out_w]
  Codes codes;
  bool vectors;  // gradients and codes of the channels lie in aligned vectors
  bool overlap;  // a position may win in several windows
  int K, out_h, out_w, pool_h, pool_w, step_h, step_w, pad_h, pad_w;

  // Writes `rounded` of channels [k, k + kSize) at position (h, w) of the map to `to`, aligned to
  // 16: zeros beyond the last channel, and everywhere unless `inside`. Adds them to `totals`,
  // unless null.
  template <typename Rounded>
  __device__ void write(unsigned char* to, int64_t n, int k, int h, int w, bool inside,
                        const Rounded& rounded, float* totals) const {
    if (vectors) {
      float sums[kSize] = {};
      if (inside) add_windows(n, k, h, w, sums);
      Vector v;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (totals) totals[i] += sums[i];
        v.e[i] = rounded(sums[i]);
      }
      *reinterpret_cast<Vector*>(to) = v;
      return;
    }
#pragma unroll 4  // as many loads at once as there are registers for
    for (int i = 0; i < kSize; ++i) {
      const float sum = inside && k + i < K ? sum_windows(n, k + i, h, w) : 0.0f;
      if (totals) totals[i] += sum;
      reinterpret_cast<T*>(to)[i] = rounded(sum);
    }
  }

 private:
  struct alignas(16) Vector {
    T e[kSize];
  };
  struct alignas(kSize) Places {
    uint8_t e[kSize];
  };

  // Calls f(offset of the window in codes over channels, ph, pw, place) for the windows over (h,
  // w).
  template <typename F>
  __device__ void for_windows(int64_t n, int h, int w, const F& f) const {
    const auto rows = windows_over(h, pool_h, step_h, pad_h, out_h);
    const auto columns = windows_over(w, pool_w, step_w, pad_w, out_w);
    for (int ph = rows.first; ph <= rows.last; ++ph)
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
    for_windows(n, h, w, [&](int64_t first, int ph, int pw, int place) {
      const Vector grads = *reinterpret_cast<const Vector*>(g.at(n, k, ph, pw));
      Places places{};
      if (codes.data)
        places =
            *reinterpret_cast<const Places*>(static_cast<const uint8_t*>(codes.data) + first + k);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (places.e[i] == place) sums[i] += static_cast<float>(grads.e[i]);
    });
  }
};

template <typename T>
MapGrad<T> map_grad(const ConvBlockShape& s, const View4<const T>& g, const Codes& codes) {
  const auto in32 = [](int64_t size) { return static_cast<int>(size); };
  constexpr int64_t kSize = MapGrad<T>::kSize;
  const bool whole = s.K % kSize == 0 && g.n % kSize == 0 && g.h % kSize == 0 && g.w % kSize == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(g.data) % 16 == 0;
  return {g,
          codes,
          g.c == 1 && whole && aligned,
          s.pool_h > s.pool_stride_h || s.pool_w > s.pool_stride_w,
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
