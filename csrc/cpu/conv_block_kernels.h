// Fast kernels of the conv block over Vec. Included once per instruction set, inside its namespace
// and target region (see vec.h).
//
// The inner layout is channels-innermost float: an image band is packed once to zero-padded
// [rows, width, C], after which no kernel looks at borders, strides or dtypes. Vectors run over
// output channels in the forward pass and over a row of taps × input channels, which is one run of
// memory, in the backward passes.

constexpr int L = Vec::kLanes;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch memory, aligned to a cache line, with room for one vector read past the end.
template <typename E>
struct Scratch {
  std::vector<E> memory;
  E* data = nullptr;
  void reserve(int64_t n) {
    memory.resize(n + (64 + 4 * L) / sizeof(E) + 4 * L);
    data = reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }
};

// ------------------------------------------------------------------------------ 8 × 8 transposes

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
inline void store8(Half* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store8(BFloat16* p, __m256 v) {
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  for (int i = 0; i < 8; ++i) p[i] = BFloat16(lanes[i]);
}

inline void transpose8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

// dst[j · dst_stride + i] = src[i · src_stride + j] for i < rows, j < columns.
template <typename S, typename D>
void transpose(const S* src, int64_t src_stride, int64_t rows, int64_t columns, D* dst,
               int64_t dst_stride) {
  const int64_t rows8 = rows / 8 * 8, columns8 = columns / 8 * 8;
  for (int64_t i = 0; i < rows8; i += 8)
    for (int64_t j = 0; j < columns8; j += 8) {
      __m256 block[8];
      for (int e = 0; e < 8; ++e) block[e] = load8(src + (i + e) * src_stride + j);
      transpose8(block);
      for (int e = 0; e < 8; ++e) store8(dst + (j + e) * dst_stride + i, block[e]);
    }
  const auto scalar = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < j1; ++j)
        dst[j * dst_stride + i] = static_cast<D>(static_cast<float>(src[i * src_stride + j]));
  };
  scalar(0, rows8, columns8, columns);
  scalar(rows8, rows, 0, columns);
}

template <typename S, typename D>
void copy_row(const S* src, int64_t n, D* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store8(dst + i, load8(src + i));
  for (; i < n; ++i) dst[i] = static_cast<D>(static_cast<float>(src[i]));
}

// ---------------------------------------------------------------------------- packing, unpacking

// Channels-innermost copy of `rows` rows of image n: dst[r · row_stride + w · pixel_stride + c].
template <typename T>
void pack_pixels(const View4<const T>& x, int64_t n, int64_t first, int64_t rows, int64_t width,
                 int64_t channels, float* dst, int64_t row_stride, int64_t pixel_stride) {
  if (x.h == width * x.w && row_stride == width * pixel_stride) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r, dst += row_stride) {
    const T* src = x.at(n, 0, first + r, 0);
    if (x.c == 1 && x.w == channels && pixel_stride == channels) {
      copy_row(src, width * channels, dst);
    } else if (channels == 1 && x.w == 1 && pixel_stride == 1) {
      copy_row(src, width, dst);
    } else if (x.c == 1) {
      for (int64_t w = 0; w < width; ++w) copy_row(src + w * x.w, channels, dst + w * pixel_stride);
    } else if (x.w == 1) {
      transpose(src, x.c, channels, width, dst, pixel_stride);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t w = 0; w < width; ++w)
          dst[w * pixel_stride + c] = static_cast<float>(src[c * x.c + w * x.w]);
    }
  }
}

// Rows [first, first + rows) of the zero-padded image, counted from the top of the padding.
template <typename T>
void pack_band(const ConvBlockShape& s, const View4<const T>& x, int64_t n, int64_t first,
               int64_t rows, float* dst) {
  const int64_t row_stride = (s.W + 2 * s.pad_w) * s.C;
  const int64_t top = std::clamp<int64_t>(s.pad_h - first, 0, rows);
  const int64_t inside = std::clamp<int64_t>(s.pad_h + s.H - first, top, rows) - top;
  std::fill_n(dst, top * row_stride, 0.f);
  std::fill_n(dst + (top + inside) * row_stride, (rows - top - inside) * row_stride, 0.f);
  float* body = dst + top * row_stride;
  if (s.pad_w > 0)
    for (int64_t r = 0; r < inside; ++r) {
      std::fill_n(body + r * row_stride, s.pad_w * s.C, 0.f);
      std::fill_n(body + (r + 1) * row_stride - s.pad_w * s.C, s.pad_w * s.C, 0.f);
    }
  pack_pixels(x, n, first + top - s.pad_h, inside, s.W, s.C, body + s.pad_w * s.C, row_stride, s.C);
}

// The way back: src[r · row_stride + w · pixel_stride + c] → rows of image n of y, which is dense
// in either memory format.
template <typename T>
void unpack_pixels(const float* src, int64_t row_stride, int64_t pixel_stride, const View4<T>& y,
                   int64_t n, int64_t first, int64_t rows, int64_t width, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r, src += row_stride) {
    T* dst = y.at(n, 0, first + r, 0);
    if (y.c == 1 && pixel_stride == channels)
      copy_row(src, width * channels, dst);
    else if (y.c == 1)
      for (int64_t w = 0; w < width; ++w) copy_row(src + w * pixel_stride, channels, dst + w * y.w);
    else
      transpose(src, pixel_stride, width, channels, dst, y.c);
  }
}

// The input rows under pooled rows [begin, end).
struct Band {
  int64_t conv_begin, conv_end;  // conv-map rows
  int64_t first, rows;           // packed input rows, counted from the top of the padding

  Band(const ConvBlockShape& s, int64_t begin, int64_t end) {
    conv_begin = std::max<int64_t>(begin * s.pool_stride_h - s.pool_pad_h, 0);
    conv_end = std::min((end - 1) * s.pool_stride_h - s.pool_pad_h + s.pool_h, s.conv_h);
    first = conv_begin * s.stride_h;
    rows = (conv_end - conv_begin - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  }
};

// The taps as runs of memory: one per kernel row without horizontal dilation, else one per tap.
struct Runs {
  int64_t count, length;  // length in floats
  std::vector<int64_t> offset;

  explicit Runs(const ConvBlockShape& s) {
    const int64_t row = (s.W + 2 * s.pad_w) * s.C;
    const bool whole_rows = s.dilation_w == 1;
    length = whole_rows ? s.kernel_w * s.C : s.C;
    for (int64_t i = 0; i < s.kernel_h; ++i)
      for (int64_t j = 0; j < (whole_rows ? 1 : s.kernel_w); ++j)
        offset.push_back(i * s.dilation_h * row + j * s.dilation_w * s.C);
    count = offset.size();
  }
};

// -------------------------------------------------------------------------------------- forward

// Register tile: kPixels conv-map positions × kVecs vectors of output channels. AVX2 has 16
// registers: 4 · 3 sums + 3 weights + 1 broadcast = 16. AVX-512 has 32: 4 · 4 + 4 + 1 = 21.
constexpr int kPixels = 4;
constexpr int kMaxVecs = L == 16 ? 4 : 3;

// Blocks of output channels, as equal as possible: 8 vectors are 3 + 3 + 2, not 3 + 3 + 2 ones.
struct ChannelBlocks {
  int64_t vecs, count;
  explicit ChannelBlocks(int64_t K)
      : vecs((K + L - 1) / L), count((vecs + kMaxVecs - 1) / kMaxVecs) {}
  int64_t begin(int64_t b) const { return b * (vecs / count) + std::min(b, vecs % count); }
};

// [block][run, position in the run][block's channels]: the order in which a tile reads it.
inline void pack_forward_weight(const ConvBlockShape& s, const float* weight, float* packed) {
  const int64_t row = s.kernel_h * s.kernel_w * s.C;
  const ChannelBlocks blocks(s.K);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t k0 = blocks.begin(b) * L, k1 = blocks.begin(b + 1) * L;
    for (int64_t e = 0; e < row; ++e)
      for (int64_t k = k0; k < k1; ++k) *packed++ = k < s.K ? weight[k * row + e] : 0.f;
  }
}

template <int kVecs>
struct Tile {
  Vec sum[kPixels][kVecs];
};

// The number and length of runs, where known when compiling: the loops over the few taps of a first
// layer are then unrolled. 0 means any.
template <int kRuns, int kLength>
struct TapLoops {
  static constexpr int runs = kRuns, length = kLength;
};
using AnyTaps = TapLoops<0, 0>;

template <typename F>
void with_taps(const Runs& runs, const F& f) {
  if (runs.count == 3 && runs.length == 3) return f(TapLoops<3, 3>{});  // 3 × 3, 1 channel
  if (runs.count == 3 && runs.length == 9) return f(TapLoops<3, 9>{});  // 3 × 3, 3 channels
  f(AnyTaps{});
}

// Sums of kPixels positions, `step` floats apart within a pair and `pair` floats between pairs:
// four in a row (pair = 2 step), or a 2 × 2 window (pair = one conv row).
template <int kVecs, typename Taps = AnyTaps>
[[gnu::always_inline]] inline void conv_tile(const float* x, int64_t step, int64_t pair,
                                             const Runs& runs, const float* w, const float* bias,
                                             Tile<kVecs>& tile) {
  const int64_t run_count = Taps::runs ? Taps::runs : runs.count;
  const int64_t run_length = Taps::length ? Taps::length : runs.length;
  Vec sum[kPixels][kVecs];
  for (int v = 0; v < kVecs; ++v)
    for (int p = 0; p < kPixels; ++p) sum[p][v] = Vec::load(bias + v * L);
#pragma GCC unroll 3
  for (int64_t r = 0; r < run_count; ++r) {
    const float* x0 = x + runs.offset[r];
    const float* x1 = x0 + step;
    const float* x2 = x0 + pair;
    const float* x3 = x2 + step;
#pragma GCC unroll 9
    for (int64_t e = 0; e < run_length; ++e, w += kVecs * L) {
      Vec weight[kVecs];
      for (int v = 0; v < kVecs; ++v) weight[v] = Vec::load(w + v * L);
      const Vec a = Vec::set(x0[e]);
      for (int v = 0; v < kVecs; ++v) sum[0][v] = Vec::fma(a, weight[v], sum[0][v]);
      const Vec b = Vec::set(x1[e]);
      for (int v = 0; v < kVecs; ++v) sum[1][v] = Vec::fma(b, weight[v], sum[1][v]);
      const Vec c = Vec::set(x2[e]);
      for (int v = 0; v < kVecs; ++v) sum[2][v] = Vec::fma(c, weight[v], sum[2][v]);
      const Vec d = Vec::set(x3[e]);
      for (int v = 0; v < kVecs; ++v) sum[3][v] = Vec::fma(d, weight[v], sum[3][v]);
    }
  }
  for (int p = 0; p < kPixels; ++p)
    for (int v = 0; v < kVecs; ++v) tile.sum[p][v] = sum[p][v];
}

constexpr float kShutCode = 255;

// PyTorch's rule: a greater value takes over, and so does every NaN.
[[gnu::always_inline]] inline void take_greater(Vec value, float place, Vec& best, Vec& code) {
  const Vec::Mask takes = Vec::either(Vec::greater(value, best), Vec::is_nan(value));
  best = Vec::select(takes, value, best);
  code = Vec::select(takes, Vec::set(place), code);
}

[[gnu::always_inline]] inline void apply_relu(Vec& best, Vec& code) {
  const Vec::Mask open = Vec::either(Vec::greater(best, Vec::zero()), Vec::is_nan(best));
  best = Vec::select(open, best, Vec::zero());
  code = Vec::select(open, code, Vec::set(kShutCode));
}

// Where the results of a band go, [pixel, channel]: straight into out and winner where their rows
// are whole vectors of float, else into scratch.
struct Results {
  float* value;
  uint8_t* code;  // null: not wanted
  int64_t stride;

  [[gnu::always_inline]] void store(int64_t pixel, int vec, Vec best, Vec place) const {
    best.store(value + pixel * stride + vec * L);
    if (code) place.store(code + pixel * stride + vec * L);
  }
};

// Pool and ReLU of a whole 2 × 2 window.
[[gnu::always_inline]] inline void store_window(const ConvBlockShape& s, const Vec (&y)[4],
                                                const Results& to, int64_t pixel, int vec) {
  Vec best = y[0], code = Vec::zero();
  for (int p = 1; p < 4; ++p) take_greater(y[p], p, best, code);
  if (s.relu) apply_relu(best, code);
  to.store(pixel, vec, best, code);
}

inline bool windows_are_2x2(const ConvBlockShape& s) {
  return s.pool_h == 2 && s.pool_w == 2 && s.pool_stride_h == 2 && s.pool_stride_w == 2 &&
         s.pool_pad_h == 0 && s.pool_pad_w == 0 && 2 * s.out_h <= s.conv_h &&
         2 * s.out_w <= s.conv_w;
}
inline bool has_no_pool(const ConvBlockShape& s) {
  return s.window() == 1 && s.pool_stride_h == 1 && s.pool_stride_w == 1;
}
inline bool needs_conv_rows(const ConvBlockShape& s) {
  return !windows_are_2x2(s) && !has_no_pool(s);
}

// Pool and ReLU for one block of channels, given the band's packed input.
template <int kVecs, typename Taps>
void windows_2x2(const ConvBlockShape& s, const float* x, const Runs& runs, const float* w,
                 const float* bias, int64_t rows, const Results& to) {
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h, step = s.stride_w * s.C;
  for (int64_t ph = 0; ph < rows; ++ph)
    for (int64_t pw = 0; pw < s.out_w; ++pw) {
      Tile<kVecs> tile;
      conv_tile<kVecs, Taps>(x + 2 * ph * row + 2 * pw * step, step, row, runs, w, bias, tile);
      const int64_t pixel = ph * s.out_w + pw;
      for (int v = 0; v < kVecs; ++v) {
        const Vec y[4] = {tile.sum[0][v], tile.sum[1][v], tile.sum[2][v], tile.sum[3][v]};
        store_window(s, y, to, pixel, v);
      }
    }
}

// Conv-map row into dst [conv_w, stride]. The last tile starts further left, so that it ends with
// the row; rows shorter than a tile read the zeros that the packed band is followed by.
template <int kVecs, typename Taps, typename Epilogue>
[[gnu::always_inline]] inline void conv_row_tiles(const ConvBlockShape& s, const float* x,
                                                  const Runs& runs, const float* w,
                                                  const float* bias, const Epilogue& epilogue) {
  const int64_t step = s.stride_w * s.C;
  for (int64_t cw = 0; cw < s.conv_w; cw += kPixels) {
    const int64_t at = std::max<int64_t>(std::min(cw, s.conv_w - kPixels), 0);
    Tile<kVecs> tile;
    conv_tile<kVecs, Taps>(x + at * step, step, 2 * step, runs, w, bias, tile);
    const int64_t pixels = std::min<int64_t>(kPixels, s.conv_w);
    for (int64_t p = 0; p < pixels; ++p) epilogue(at + p, tile.sum[p]);
  }
}

template <int kVecs, typename Taps>
void no_pool(const ConvBlockShape& s, const float* x, const Runs& runs, const float* w,
             const float* bias, int64_t rows, const Results& to) {
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h;
  for (int64_t h = 0; h < rows; ++h)
    conv_row_tiles<kVecs, Taps>(s, x + h * row, runs, w, bias, [&](int64_t cw, const Vec* sum) {
      const int64_t pixel = h * s.conv_w + cw;
      for (int v = 0; v < kVecs; ++v) {
        Vec best = sum[v], code = Vec::zero();
        if (s.relu) apply_relu(best, code);
        to.store(pixel, v, best, code);
      }
    });
}

// Any window: the block's conv rows of the band go through `conv`, then the windows over it.
template <int kVecs>
void any_window(const ConvBlockShape& s, const float* x, const Runs& runs, const float* w,
                const float* bias, const Band& band, int64_t begin, int64_t rows, float* conv,
                const Results& to) {
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h, pixel_stride = kVecs * L;
  for (int64_t h = 0; h < band.conv_end - band.conv_begin; ++h)
    conv_row_tiles<kVecs, AnyTaps>(s, x + h * row, runs, w, bias, [&](int64_t cw, const Vec* sum) {
      for (int v = 0; v < kVecs; ++v)
        sum[v].store(conv + (h * s.conv_w + cw) * pixel_stride + v * L);
    });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t pw = 0; pw < s.out_w; ++pw) {
      const int64_t h0 = (begin + r) * s.pool_stride_h - s.pool_pad_h;
      const int64_t w0 = pw * s.pool_stride_w - s.pool_pad_w;
      const int64_t h_begin = std::max<int64_t>(h0, 0), h_end = std::min(h0 + s.pool_h, s.conv_h);
      const int64_t w_begin = std::max<int64_t>(w0, 0), w_end = std::min(w0 + s.pool_w, s.conv_w);
      for (int v = 0; v < kVecs; ++v) {
        Vec best = Vec::set(-std::numeric_limits<float>::infinity());
        Vec code = Vec::set(float((h_begin - h0) * s.pool_w + w_begin - w0));
        for (int64_t h = h_begin; h < h_end; ++h)
          for (int64_t cw = w_begin; cw < w_end; ++cw)
            take_greater(
                Vec::load(conv + ((h - band.conv_begin) * s.conv_w + cw) * pixel_stride + v * L),
                float((h - h0) * s.pool_w + cw - w0), best, code);
        if (s.relu) apply_relu(best, code);
        const int64_t pixel = r * s.out_w + pw;
        to.store(pixel, v, best, code);
      }
    }
}

template <int kVecs>
void forward_block(const ConvBlockShape& s, const float* x, const Runs& runs, const float* w,
                   const float* bias, const Band& band, int64_t begin, int64_t rows, float* conv,
                   const Results& to) {
  if (has_no_pool(s))
    with_taps(runs,
              [&](auto taps) { no_pool<kVecs, decltype(taps)>(s, x, runs, w, bias, rows, to); });
  else if (windows_are_2x2(s))
    with_taps(runs, [&](auto taps) {
      windows_2x2<kVecs, decltype(taps)>(s, x, runs, w, bias, rows, to);
    });
  else
    any_window<kVecs>(s, x, runs, w, bias, band, begin, rows, conv, to);
}

// ----------------------------------------------------------------------------- forward: Winograd

// F(2 × 2, 3 × 3): a 4 × 4 input patch gives a 2 × 2 output tile, which is the pool window, with 16
// products per pair of channels where the direct sum has 36. With d the patch and g the kernel:
//
//   output = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A        (Lavin and Gray, arXiv:1509.09308)
//
//        1  0 -1  0          1   0   0
//   Bᵀ = 0  1  1  0     G =  ½   ½   ½     Aᵀ = 1  1  1  0
//        0 -1  1  0          ½  -½   ½          0  1 -1 -1
//        0  1  0 -1          0   0   1
//
// Output row 0 sees patch rows 0 … 2 and row 1 sees 1 … 3, as in the direct sum, so that a NaN
// reaches the same outputs. An infinity would become NaN: a tile with a result that is not finite
// is done again directly.

// Where it pays: at least 16 input channels to spread the transforms over, in whole vectors.
inline bool winograd_serves(const ConvBlockShape& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && windows_are_2x2(s) && s.C % L == 0 &&
         s.C >= 16 && s.K >= 16;
}

constexpr int kPositions = 16;

// G g along one axis.
[[gnu::always_inline]] inline void winograd_kernel_axis(Vec g0, Vec g1, Vec g2, Vec (&u)[4]) {
  const Vec half = Vec::set(0.5f), outer = (g0 + g2) * half, inner = g1 * half;
  u[0] = g0, u[1] = outer + inner, u[2] = outer - inner, u[3] = g2;
}

// G g Gᵀ [block][position][c][block's channels] of packed forward weights [block][tap][c][...].
inline void winograd_weight(const ConvBlockShape& s, const float* weight, float* u) {
  const ChannelBlocks blocks(s.K);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t width = (blocks.begin(b + 1) - blocks.begin(b)) * L, step = s.C * width;
    for (int64_t e = 0; e < step; e += L) {
      Vec columns[3][4], row[4];
      for (int j = 0; j < 3; ++j)
        winograd_kernel_axis(Vec::load(weight + j * step + e),
                             Vec::load(weight + (3 + j) * step + e),
                             Vec::load(weight + (6 + j) * step + e), columns[j]);
      for (int i = 0; i < 4; ++i) {
        winograd_kernel_axis(columns[0][i], columns[1][i], columns[2][i], row);
        for (int j = 0; j < 4; ++j) row[j].store(u + (4 * i + j) * step + e);
      }
    }
    weight += 9 * step, u += kPositions * step;
  }
}

// Bᵀ d B of the patch at x, all channels: v[position · stride + c].
inline void winograd_input(const float* x, int64_t row, int64_t C, float* v, int64_t stride) {
  for (int64_t c = 0; c < C; c += L) {
    Vec d[4][4];
    for (int j = 0; j < 4; ++j) {
      Vec column[4];
      for (int i = 0; i < 4; ++i) column[i] = Vec::load(x + i * row + j * C + c);
      d[0][j] = column[0] - column[2];
      d[1][j] = column[1] + column[2];
      d[2][j] = column[2] - column[1];
      d[3][j] = column[1] - column[3];
    }
    for (int i = 0; i < 4; ++i) {
      (d[i][0] - d[i][2]).store(v + (4 * i) * stride + c);
      (d[i][1] + d[i][2]).store(v + (4 * i + 1) * stride + c);
      (d[i][2] - d[i][1]).store(v + (4 * i + 2) * stride + c);
      (d[i][1] - d[i][3]).store(v + (4 * i + 3) * stride + c);
    }
  }
}

// Tiles of a product's register block: tiles × vectors fill the registers as in conv_tile.
constexpr int tiles_in_registers(int vecs) {
  return L == 16 ? (vecs == 4 ? 6 : vecs == 3 ? 8 : 12) : 12 / vecs;
}
constexpr int kTileMultiple = 24;  // divisible by all of them

// m [tiles, kVecs · L] = v [tiles, C] · u [C, kVecs · L]
template <int kVecs>
void multiply(const float* v, const float* u, int64_t C, int64_t tiles, float* m) {
  constexpr int kTiles = tiles_in_registers(kVecs);
  for (int64_t t = 0; t < tiles; t += kTiles, v += kTiles * C, m += kTiles * kVecs * L) {
    Vec sum[kTiles][kVecs];
    for (int i = 0; i < kTiles; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec::zero();
    const float* w = u;
    for (int64_t c = 0; c < C; ++c, w += kVecs * L) {
      Vec weight[kVecs];
      for (int j = 0; j < kVecs; ++j) weight[j] = Vec::load(w + j * L);
      for (int i = 0; i < kTiles; ++i) {
        const Vec value = Vec::set(v[i * C + c]);
        for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec::fma(value, weight[j], sum[i][j]);
      }
    }
    for (int i = 0; i < kTiles; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j].store(m + (i * kVecs + j) * L);
  }
}

// Aᵀ m A of one vector: window positions in row-major order, bias added.
[[gnu::always_inline]] inline void winograd_output(const float* m, int64_t stride, Vec bias,
                                                   Vec (&y)[4]) {
  Vec upper[4], lower[4];
  for (int j = 0; j < 4; ++j) {
    const Vec m0 = Vec::load(m + j * stride), m1 = Vec::load(m + (4 + j) * stride);
    const Vec m2 = Vec::load(m + (8 + j) * stride), m3 = Vec::load(m + (12 + j) * stride);
    upper[j] = m0 + m1 + m2;
    lower[j] = m1 - m2 - m3;
  }
  y[0] = upper[0] + upper[1] + upper[2] + bias;
  y[1] = upper[1] - upper[2] - upper[3] + bias;
  y[2] = lower[0] + lower[1] + lower[2] + bias;
  y[3] = lower[1] - lower[2] - lower[3] + bias;
}

// One block of channels of `tiles` windows whose transformed patches are v [position, tile, C].
// patch(t) is tile t's patch; w: the block's direct weights, for tiles that are not finite.
template <int kVecs, typename Patch>
void winograd_block(const ConvBlockShape& s, const float* v, int64_t tiles, int64_t padded_tiles,
                    const float* u, const float* w, const float* bias, const Runs& runs, float* m,
                    const Results& to, const Patch& patch) {
  constexpr int kWidth = kVecs * L;
  const int64_t stride = padded_tiles * kWidth;
  for (int p = 0; p < kPositions; ++p)
    multiply<kVecs>(v + p * padded_tiles * s.C, u + p * s.C * kWidth, s.C, padded_tiles,
                    m + p * stride);
  for (int64_t t = 0; t < tiles; ++t) {
    Vec y[kVecs][4], difference = Vec::zero();
    for (int j = 0; j < kVecs; ++j) {
      winograd_output(m + t * kWidth + j * L, stride, Vec::load(bias + j * L), y[j]);
      const Vec sum = y[j][0] + y[j][1] + y[j][2] + y[j][3];
      difference = difference + (sum - sum);  // 0, or NaN if any is not finite
    }
    if (Vec::bits(Vec::is_nan(difference))) {
      Tile<kVecs> tile;
      const int64_t row = (s.W + 2 * s.pad_w) * s.C;
      conv_tile<kVecs>(patch(t), s.C, row, runs, w, bias, tile);
      for (int j = 0; j < kVecs; ++j)
        for (int p = 0; p < 4; ++p) y[j][p] = tile.sum[p][j];
    }
    for (int j = 0; j < kVecs; ++j) store_window(s, y[j], to, t, j);
  }
}

// ------------------------------------------------------------------------------- forward: drivers

// What a thread needs to bring the results of a group of bands home.
template <typename T>
struct Home {
  const ConvBlockShape& s;
  const View4<T>& out;
  uint8_t* winner;
  int64_t padded_K;
  bool whole_vectors, direct;
  Scratch<float> values;
  Scratch<uint8_t> codes;

  Home(const ConvBlockShape& shape, const View4<T>& y, uint8_t* w, int64_t pixels)
      : s(shape), out(y), winner(w), padded_K(round_up(shape.K, L)) {
    whole_vectors = padded_K == s.K;
    direct = whole_vectors && out.c == 1 && std::is_same_v<T, float>;
    if (!direct) values.reserve(pixels * padded_K);
    if (winner && !whole_vectors) codes.reserve(pixels * padded_K);
  }

  uint8_t* winner_row(int64_t n, int64_t p0) const {
    return winner + (n * s.out_h + p0) * s.out_w * s.K;
  }

  // Channels from k0 on of the pixels from pooled row p0 of image n on.
  Results block(int64_t n, int64_t p0, int64_t k0) const {
    float* value = direct ? reinterpret_cast<float*>(out.at(n, k0, p0, 0)) : values.data + k0;
    uint8_t* code = !winner ? nullptr : whole_vectors ? winner_row(n, p0) + k0 : codes.data + k0;
    return {value, code, padded_K};
  }

  // `pixels` of each of `images`; out is dense, so that they are one long row.
  void finish(int64_t n, int64_t p0, int64_t images, int64_t pixels) const {
    if (!direct)
      for (int64_t i = 0; i < images; ++i)
        unpack_pixels(values.data + i * pixels * padded_K, 0, padded_K, out, n + i, p0, 1, pixels,
                      s.K);
    if (winner && !whole_vectors)
      for (int64_t p = 0; p < images * pixels; ++p)
        std::copy_n(codes.data + p * padded_K, s.K, winner_row(n, p0) + p * s.K);
  }
};

template <typename F>
void with_vecs(int64_t vecs, const F& f) {
  if (vecs == 1) f(std::integral_constant<int, 1>{});
  if (vecs == 2) f(std::integral_constant<int, 2>{});
  if (vecs == 3) f(std::integral_constant<int, 3>{});
  if constexpr (kMaxVecs > 3)
    if (vecs == 4) f(std::integral_constant<int, 4>{});
}

// Floats of packed input of one band of `rows` pooled rows.
inline int64_t packed_floats(const ConvBlockShape& s, int64_t rows) {
  const int64_t conv_rows = (rows - 1) * s.pool_stride_h + s.pool_h;
  return ((conv_rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1) *
         (s.W + 2 * s.pad_w) * s.C;
}

// Packed floats of a group of bands: half of a small second-level cache.
constexpr int64_t kGroupFloats = 65536;

// Images that are packed together, when each is one band.
inline int64_t images_in_group(const ConvBlockShape& s, int64_t bands, int64_t packed_size,
                               int64_t most) {
  return bands > 1 ? 1 : std::clamp<int64_t>(kGroupFloats / packed_size, 1, most);
}

template <typename T>
void forward_direct(const ConvBlockShape& s, const View4<const T>& x, const float* weight,
                    const float* bias, const View4<T>& out, uint8_t* winner, int64_t band,
                    int64_t begin, int64_t end) {
  const Runs runs(s);
  const ChannelBlocks blocks(s.K);
  const int64_t taps = s.kernel_h * s.kernel_w * s.C, bands = (s.out_h + band - 1) / band;
  Scratch<float> packed, conv;
  Home<T> home(s, out, winner, band * s.out_w);
  // A tile over a row shorter than itself reads up to 3 steps too far; those sums are dropped.
  packed.reserve(packed_floats(s, band) + kPixels * s.stride_w * s.C);
  if (needs_conv_rows(s))
    conv.reserve(((band - 1) * s.pool_stride_h + s.pool_h) * s.conv_w * kMaxVecs * L);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t rows = std::min(band, s.out_h - p0);
    const Band input(s, p0, p0 + rows);
    pack_band(s, x, n, input.first, input.rows, packed.data);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t k0 = blocks.begin(b) * L;
      with_vecs(blocks.begin(b + 1) - blocks.begin(b), [&](auto vecs) {
        forward_block<decltype(vecs)::value>(s, packed.data, runs, weight + k0 * taps, bias + k0,
                                             input, p0, rows, conv.data, home.block(n, p0, k0));
      });
    }
    home.finish(n, p0, 1, rows * s.out_w);
  }
}

template <typename T>
void forward_winograd(const ConvBlockShape& s, const View4<const T>& x, const float* weight,
                      const float* u, const float* bias, const View4<T>& out, uint8_t* winner,
                      int64_t band, int64_t begin, int64_t end) {
  const Runs runs(s);
  const ChannelBlocks blocks(s.K);
  const int64_t taps = 9 * s.C, row = (s.W + 2 * s.pad_w) * s.C;
  const int64_t bands = (s.out_h + band - 1) / band, packed_size = packed_floats(s, band);
  const int64_t group = images_in_group(s, bands, packed_size, end - begin);
  // Transformed patches of a block of tiles take a quarter of a small second-level cache.
  const int64_t block_tiles =
      std::max<int64_t>(round_up(32768 / (kPositions * s.C), kTileMultiple), kTileMultiple);
  Scratch<float> packed, v, m;
  Home<T> home(s, out, winner, group * band * s.out_w);
  packed.reserve(group * packed_size);
  v.reserve(kPositions * block_tiles * s.C);
  m.reserve(kPositions * block_tiles * kMaxVecs * L);

  for (int64_t unit = begin; unit < end; unit += group) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t images = std::min(group, end - unit);
    const int64_t pixels = std::min(band, s.out_h - p0) * s.out_w;
    const Band input(s, p0, p0 + pixels / s.out_w);
    for (int64_t i = 0; i < images; ++i)
      pack_band(s, x, n + i, input.first, input.rows, packed.data + i * packed_size);
    for (int64_t t0 = 0; t0 < images * pixels; t0 += block_tiles) {
      const int64_t tiles = std::min(block_tiles, images * pixels - t0);
      const int64_t padded = round_up(tiles, kTileMultiple);
      const auto patch = [&](int64_t t) {
        const int64_t p = (t0 + t) % pixels;
        return packed.data + (t0 + t) / pixels * packed_size + p / s.out_w * 2 * row +
               p % s.out_w * 2 * s.C;
      };
      for (int64_t t = 0; t < tiles; ++t)
        winograd_input(patch(t), row, s.C, v.data + t * s.C, padded * s.C);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t k0 = blocks.begin(b) * L;
        Results to = home.block(n, p0, k0);
        to.value += t0 * to.stride;
        if (to.code) to.code += t0 * to.stride;
        with_vecs(blocks.begin(b + 1) - blocks.begin(b), [&](auto vecs) {
          winograd_block<decltype(vecs)::value>(s, v.data, tiles, padded, u + k0 * kPositions * s.C,
                                                weight + k0 * taps, bias + k0, runs, m.data, to,
                                                patch);
        });
      }
    }
    home.finish(n, p0, images, pixels);
  }
}

template <typename T>
void forward(const ConvBlockShape& s, const View4<const T>& x, const float* weight,
             const float* bias, const View4<T>& out, uint8_t* winner, int64_t band, int64_t begin,
             int64_t end) {
  const int64_t padded_K = round_up(s.K, L);
  Scratch<float> packed_weight, packed_bias, u;
  packed_weight.reserve(padded_K * s.kernel_h * s.kernel_w * s.C);
  pack_forward_weight(s, weight, packed_weight.data);
  packed_bias.reserve(padded_K);
  std::copy_n(bias, s.K, packed_bias.data);
  if (winograd_serves(s)) {
    u.reserve(padded_K * kPositions * s.C);
    winograd_weight(s, packed_weight.data, u.data);
    forward_winograd<T>(s, x, packed_weight.data, u.data, packed_bias.data, out, winner, band,
                        begin, end);
  } else {
    forward_direct<T>(s, x, packed_weight.data, packed_bias.data, out, winner, band, begin, end);
  }
}

// ----------------------------------------------------------------- backward: what both passes need

// The gradient is sparse: one conv-map position per pooled output. Both passes work on rows of
// taps × input channels held in registers, kRuns runs × kVecs vectors at a time:
// AVX2: 12 sums + 1 broadcast of 16 registers; AVX-512: 18 of 32, a whole 3 × 3 × 32 kernel.
constexpr int kMaxSums = L == 16 ? 18 : 12;
constexpr int kMaxRuns = 3;

// Which runs, and which vectors of each, are in registers together.
struct Pass {
  int64_t run, runs, vec, vecs;
  int64_t sums() const { return runs * vecs; }
};

inline std::vector<Pass> passes_over(const Runs& runs) {
  const int64_t vecs = (runs.length + L - 1) / L;
  const int64_t together = std::clamp<int64_t>(kMaxSums / vecs, 1, kMaxRuns);
  const int64_t groups = (runs.count + together - 1) / together;
  const int64_t blocks = (vecs + kMaxSums - 1) / kMaxSums;
  std::vector<Pass> passes;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t r0 = g * runs.count / groups, r1 = (g + 1) * runs.count / groups;
      const int64_t v0 = b * vecs / blocks, v1 = (b + 1) * vecs / blocks;
      passes.push_back({r0, r1 - r0, v0, v1 - v0});
    }
  return passes;
}

// dw += Σ_p g[p] · x[at[p] ...]
template <int kRuns, int kVecs>
void add_positions(const float* x, const int64_t* run, const float* g, const int32_t* at, int64_t n,
                   float* dw) {
  Vec sum[kRuns][kVecs];
  for (int r = 0; r < kRuns; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::load(dw + (r * kVecs + v) * L);
  for (int64_t p = 0; p < n; ++p) {
    const Vec scale = Vec::set(g[p]);
    for (int r = 0; r < kRuns; ++r) {
      const float* src = x + at[p] + run[r];
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] = Vec::fma(scale, Vec::load(src + v * L), sum[r][v]);
    }
  }
  for (int r = 0; r < kRuns; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v].store(dw + (r * kVecs + v) * L);
}

// dx[...] += Σ_e g[e] · w[channel[e]]. The last vector of each run has `tail` lanes of its own;
// what lies behind them belongs to other pixels and is left as it is.
template <int kRuns, int kVecs>
void add_channels(float* dx, const int64_t* run, const float* w, const float* g,
                  const uint8_t* channel, int64_t n, int64_t tail) {
  Vec sum[kRuns][kVecs];
  for (int r = 0; r < kRuns; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::load(dx + run[r] + v * L);
  for (int64_t e = 0; e < n; ++e) {
    const Vec scale = Vec::set(g[e]);
    const float* src = w + channel[e] * (kRuns * kVecs * L);
    for (int r = 0; r < kRuns; ++r)
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] = Vec::fma(scale, Vec::load(src + (r * kVecs + v) * L), sum[r][v]);
  }
  for (int r = 0; r < kRuns; ++r) {
    for (int v = 0; v < kVecs - 1; ++v) sum[r][v].store(dx + run[r] + v * L);
    float* last = dx + run[r] + (kVecs - 1) * L;
    if (tail == L)
      sum[r][kVecs - 1].store(last);
    else
      Vec::select(Vec::first(tail), sum[r][kVecs - 1], Vec::load(last)).store(last);
  }
}

using AddPositions = void (*)(const float*, const int64_t*, const float*, const int32_t*, int64_t,
                              float*);
using AddChannels = void (*)(float*, const int64_t*, const float*, const float*, const uint8_t*,
                             int64_t, int64_t);

template <int kRuns, int... kVecsLessOne>
AddPositions pick_add_positions(int64_t vecs, std::integer_sequence<int, kVecsLessOne...>) {
  static constexpr AddPositions kTable[] = {add_positions<kRuns, kVecsLessOne + 1>...};
  return kTable[vecs - 1];
}
template <int kRuns, int... kVecsLessOne>
AddChannels pick_add_channels(int64_t vecs, std::integer_sequence<int, kVecsLessOne...>) {
  static constexpr AddChannels kTable[] = {add_channels<kRuns, kVecsLessOne + 1>...};
  return kTable[vecs - 1];
}
template <int kRuns>
using VecCounts = std::make_integer_sequence<int, kMaxSums / kRuns>;

inline AddPositions add_positions_for(const Pass& pass) {
  if (pass.runs == 1) return pick_add_positions<1>(pass.vecs, VecCounts<1>{});
  if (pass.runs == 2) return pick_add_positions<2>(pass.vecs, VecCounts<2>{});
  return pick_add_positions<3>(pass.vecs, VecCounts<3>{});
}
inline AddChannels add_channels_for(const Pass& pass) {
  if (pass.runs == 1) return pick_add_channels<1>(pass.vecs, VecCounts<1>{});
  if (pass.runs == 2) return pick_add_channels<2>(pass.vecs, VecCounts<2>{});
  return pick_add_channels<3>(pass.vecs, VecCounts<3>{});
}

// Offset in the packed image of the first tap of place `code` of a window, less that of place 0.
inline int64_t place_offset(const ConvBlockShape& s, int64_t code) {
  return (code / s.pool_w * s.stride_h * (s.W + 2 * s.pad_w) + code % s.pool_w * s.stride_w) * s.C;
}
// Offset of place 0 of pooled output (ph, pw), from packed row `first` on. Negative where pool
// padding lies above: no winner has such a place.
inline int64_t window_offset(const ConvBlockShape& s, int64_t ph, int64_t pw, int64_t first) {
  const int64_t h = (ph * s.pool_stride_h - s.pool_pad_h) * s.stride_h - first;
  return (h * (s.W + 2 * s.pad_w) + (pw * s.pool_stride_w - s.pool_pad_w) * s.stride_w) * s.C;
}

// Pooled rows whose input rows fill about half of a 32 KiB first-level cache.
inline int64_t rows_in_l1(const ConvBlockShape& s) {
  const int64_t row = s.pool_stride_h * s.stride_h * (s.W + 2 * s.pad_w) * s.C * 4;
  return std::clamp<int64_t>(16384 / row, 1, s.out_h);
}

// ------------------------------------------------------------------------------ backward: weight

// The gradient of a group of bands by channel: g [K, stride] with zero where the ReLU is shut, and
// `at`, the packed offset of each winner's first tap.
struct ChannelMajor {
  Scratch<float> g, code, base;
  Scratch<int32_t> at;
  int64_t stride = 0;
  float places[16];  // offset of each place of a window

  void reserve(const ConvBlockShape& s, int64_t channels, int64_t pixels) {
    for (int64_t q = 0; q < s.window(); ++q) places[q] = float(place_offset(s, q));
    stride = round_up(pixels, L);
    g.reserve(channels * stride), code.reserve(channels * stride), at.reserve(channels * stride);
    base.reserve(stride);
  }

  // Pooled rows [p0, p1) of image n as columns from `column` on. Their packed rows begin at
  // `packed` and are those from `first` on.
  template <typename T>
  void fill(const ConvBlockShape& s, const View4<const T>& grad, const uint8_t* winner, int64_t n,
            int64_t p0, int64_t p1, int64_t first, int64_t column, int64_t packed) {
    const int64_t pixels = (p1 - p0) * s.out_w;
    float* at_place_0 = base.data + column;
    for (int64_t ph = p0; ph < p1; ++ph)
      for (int64_t pw = 0; pw < s.out_w; ++pw)
        *at_place_0++ = float(packed + window_offset(s, ph, pw, first));
    if (winner)
      transpose(winner + (n * s.out_h + p0) * s.out_w * s.K, s.K, pixels, s.K, code.data + column,
                stride);
    const bool one_row = grad.h == s.out_w * grad.w;
    const int64_t width = one_row ? pixels : s.out_w;
    for (int64_t r = 0; r < (one_row ? 1 : p1 - p0); ++r) {
      const T* src = grad.at(n, 0, p0 + r, 0);
      float* dst = g.data + column + r * width;
      if (grad.w == 1)
        for (int64_t k = 0; k < s.K; ++k) copy_row(src + k * grad.c, width, dst + k * stride);
      else if (grad.c == 1)
        transpose(src, grad.w, width, s.K, dst, stride);
      else
        for (int64_t k = 0; k < s.K; ++k)
          for (int64_t w = 0; w < width; ++w)
            dst[k * stride + w] = static_cast<float>(src[k * grad.c + w * grad.w]);
    }
  }

  // Codes of channel k → offsets and masked gradients, `pixels` of them; returns the gradients'
  // sum.
  float place(const ConvBlockShape& s, int64_t k, int64_t pixels, bool has_code) {
    float* grad = g.data + k * stride;
    for (int64_t p = pixels; p < round_up(pixels, L); ++p) grad[p] = 0, base.data[p] = 0;
    Vec sum = Vec::zero();
    for (int64_t p = 0; p < pixels; p += L) {
      Vec value = Vec::load(grad + p), offset = Vec::load(base.data + p);
      if (has_code) {
        const Vec c = Vec::load(code.data + k * stride + p);
        const Vec::Mask shut = Vec::equal(c, Vec::set(kShutCode));
        value = Vec::select(shut, Vec::zero(), value);
        Vec place = Vec::zero();
        for (int64_t q = 1; q < s.window(); ++q)
          place = Vec::select(Vec::equal(c, Vec::set(float(q))), Vec::set(places[q]), place);
        // Place 0 of a window may lie outside the map: a shut winner points at the very beginning.
        offset = Vec::select(shut, Vec::zero(), offset + place);
      }
      value.store(grad + p);
      offset.store(at.data + k * stride + p);
      sum = sum + value;
    }
    float lanes[L], total = 0;
    sum.store(lanes);
    for (float lane : lanes) total += lane;
    return total;
  }
};

// Floats of dW that stay in the first-level cache while a group's images go by.
constexpr int64_t kWeightBlockFloats = 3072;

// Where taps × input channels are few, runs are shorter than a vector: there the vectors run over
// output channels, and every place of the window is added, with zero gradient for the losers.
// Cycles per pooled output by either way, from 2 fused multiply-adds a cycle, 3 cycles a pass for
// the position, and broadcasts that bind the dense way to about 1.7 a cycle.
inline bool dense_is_cheaper(const ConvBlockShape& s, const std::vector<Pass>& passes) {
  // The dense way reads under every place, so all of them must lie inside the map.
  if (s.pool_pad_h > 0 || s.pool_pad_w > 0 ||
      (s.out_h - 1) * s.pool_stride_h + s.pool_h > s.conv_h ||
      (s.out_w - 1) * s.pool_stride_w + s.pool_w > s.conv_w)
    return false;
  double sparse = 0;
  for (const Pass& pass : passes) sparse += pass.sums() / 2. + 3;
  const double elements = double(s.kernel_h * s.kernel_w * s.C * s.window());
  return elements * 0.6 / L * round_up(s.K, L) / s.K < sparse;
}

constexpr int kMaxElements = L == 16 ? 24 : 12;

// dw[e] += Σ_p Σ_q [code = q] g[p] · x[window(p) + place(q) + element(e)] for one vector of output
// channels; g and codes [pixels, stride].
template <int kElements>
void add_dense(const float* x, const int64_t* window, const int64_t* place, int64_t places,
               const int64_t* element, const float* g, const uint8_t* code, int64_t stride,
               int64_t pixels, float* dw, float* db) {
  Vec sum[kElements], grads = Vec::zero();
  int64_t offset[kElements];
  for (int e = 0; e < kElements; ++e) sum[e] = Vec::load(dw + e * L), offset[e] = element[e];
  for (int64_t p = 0; p < pixels; ++p) {
    const Vec grad = Vec::load(g + p * stride);
    const Vec winner = code ? Vec::load(code + p * stride) : Vec::zero();
    for (int64_t q = 0; q < places; ++q) {
      const Vec mine = Vec::select(Vec::equal(winner, Vec::set(float(q))), grad, Vec::zero());
      const float* src = x + window[p] + place[q];
      for (int e = 0; e < kElements; ++e) sum[e] = Vec::fma(Vec::set(src[offset[e]]), mine, sum[e]);
      grads = grads + mine;
    }
  }
  for (int e = 0; e < kElements; ++e) sum[e].store(dw + e * L);
  if (db) (Vec::load(db) + grads).store(db);
}

using AddDense = void (*)(const float*, const int64_t*, const int64_t*, int64_t, const int64_t*,
                          const float*, const uint8_t*, int64_t, int64_t, float*, float*);
template <int... kElementsLessOne>
AddDense add_dense_for(int64_t elements, std::integer_sequence<int, kElementsLessOne...>) {
  static constexpr AddDense kTable[] = {add_dense<kElementsLessOne + 1>...};
  return kTable[elements - 1];
}

template <typename T>
void backward_weight_dense(const ConvBlockShape& s, const View4<const T>& grad_out,
                           const View4<const T>& x, const uint8_t* winner, float* partial,
                           int64_t chunk, int64_t begin, int64_t end) {
  const Runs runs(s);
  const int64_t elements = runs.count * runs.length, padded_K = round_up(s.K, L);
  // Gradients of a band fill half of a 32 KiB first-level cache.
  const int64_t band = std::clamp<int64_t>(4096 / (s.out_w * padded_K), 1, s.out_h);
  const int64_t places = winner ? s.window() : 1,
                blocks = (elements + kMaxElements - 1) / kMaxElements;
  std::vector<int64_t> element, place, window(band * s.out_w);
  for (int64_t r = 0; r < runs.count; ++r)
    for (int64_t e = 0; e < runs.length; ++e) element.push_back(runs.offset[r] + e);
  for (int64_t q = 0; q < places; ++q) place.push_back(place_offset(s, q));
  Scratch<float> packed, grad, dw;
  Scratch<uint8_t> codes;
  packed.reserve(packed_floats(s, band));
  grad.reserve(band * s.out_w * padded_K), codes.reserve(band * s.out_w * padded_K);
  dw.reserve(padded_K * (elements + 1));

  for (int64_t unit = begin; unit < end; ++unit) {
    std::fill_n(dw.data, padded_K * (elements + 1), 0.f);
    for (int64_t n = unit * chunk; n < std::min((unit + 1) * chunk, s.N); ++n)
      for (int64_t p0 = 0; p0 < s.out_h; p0 += band) {
        const int64_t rows = std::min(band, s.out_h - p0), pixels = rows * s.out_w;
        const Band input(s, p0, p0 + rows);
        pack_band(s, x, n, input.first, input.rows, packed.data);
        pack_pixels(grad_out, n, p0, rows, s.out_w, s.K, grad.data, s.out_w * padded_K, padded_K);
        const uint8_t* code = winner ? winner + (n * s.out_h + p0) * s.out_w * s.K : nullptr;
        if (winner && padded_K != s.K) {
          for (int64_t p = 0; p < pixels; ++p)
            std::copy_n(code + p * s.K, s.K, codes.data + p * padded_K);
          code = codes.data;
        }
        for (int64_t r = 0, p = 0; r < rows; ++r)
          for (int64_t pw = 0; pw < s.out_w; ++pw)
            window[p++] = window_offset(s, p0 + r, pw, input.first);
        for (int64_t k = 0; k < padded_K; k += L) {
          float* dst = dw.data + k * (elements + 1);
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t e0 = b * elements / blocks, e1 = (b + 1) * elements / blocks;
            add_dense_for(e1 - e0, std::make_integer_sequence<int, kMaxElements>{})(
                packed.data, window.data(), place.data(), places, element.data() + e0,
                grad.data + k, code ? code + k : nullptr, padded_K, pixels, dst + e0 * L,
                b == 0 ? dst + elements * L : nullptr);
          }
        }
      }
    // [channel vector][element | bias][lane] → [K, elements | bias]
    float* to = partial + unit * s.K * (elements + 1);
    for (int64_t k = 0; k < s.K; ++k)
      for (int64_t e = 0; e <= elements; ++e)
        to[k * (elements + 1) + e] = dw.data[(k / L * (elements + 1) + e) * L + k % L];
  }
}

template <typename T>
void backward_weight(const ConvBlockShape& s, const View4<const T>& grad_out,
                     const View4<const T>& x, const uint8_t* winner, float* partial, int64_t band,
                     int64_t chunk, int64_t begin, int64_t end) {
  const Runs runs(s);
  const std::vector<Pass> passes = passes_over(runs);
  if (dense_is_cheaper(s, passes))
    return backward_weight_dense(s, grad_out, x, winner, partial, chunk, begin, end);
  const int64_t taps = s.kernel_h * s.kernel_w * s.C, l1_rows = rows_in_l1(s);
  int64_t sums = 0;
  for (const Pass& pass : passes) sums += pass.sums() * L;
  const int64_t k_block = std::clamp<int64_t>(kWeightBlockFloats / sums, 1, s.K);

  // A group is one band of one image, or several images that are one band each.
  const int64_t bands = (s.out_h + band - 1) / band, rows = std::min(band, s.out_h);
  const int64_t packed_size = packed_floats(s, rows);
  const int64_t group = images_in_group(s, bands, packed_size, std::min(chunk, s.N));
  Scratch<float> packed, dw;
  ChannelMajor grads;
  packed.reserve(group * packed_size);
  grads.reserve(s, s.K, group * rows * s.out_w);
  dw.reserve(s.K * (sums + 1));
  float* db = dw.data + s.K * sums;

  for (int64_t unit = begin; unit < end; ++unit) {
    std::fill_n(dw.data, s.K * (sums + 1), 0.f);
    const int64_t n_end = std::min((unit + 1) * chunk, s.N);
    for (int64_t n0 = unit * chunk; n0 < n_end; n0 += group)
      for (int64_t p0 = 0; p0 < s.out_h; p0 += band) {
        const int64_t p1 = std::min(p0 + band, s.out_h), pixels = (p1 - p0) * s.out_w;
        const int64_t images = std::min(group, n_end - n0);
        const Band input(s, p0, p1);
        for (int64_t i = 0; i < images; ++i) {
          pack_band(s, x, n0 + i, input.first, input.rows, packed.data + i * packed_size);
          grads.fill(s, grad_out, winner, n0 + i, p0, p1, input.first, i * pixels, i * packed_size);
        }
        for (int64_t k = 0; k < s.K; ++k)
          db[k] += grads.place(s, k, images * pixels, winner != nullptr);
        for (int64_t k0 = 0; k0 < s.K; k0 += k_block) {
          const int64_t k1 = std::min(k0 + k_block, s.K);
          for (int64_t i = 0; i < images; ++i)
            for (int64_t row = 0; row < p1 - p0; row += l1_rows) {
              const int64_t at = i * pixels + row * s.out_w;
              const int64_t count = std::min(l1_rows, p1 - p0 - row) * s.out_w;
              float* dst = dw.data + k0 * sums;
              for (const Pass& pass : passes) {
                const AddPositions add = add_positions_for(pass);
                for (int64_t k = k0; k < k1; ++k, dst += pass.sums() * L)
                  add(packed.data + pass.vec * L, runs.offset.data() + pass.run,
                      grads.g.data + k * grads.stride + at, grads.at.data + k * grads.stride + at,
                      count, dst);
              }
            }
        }
      }
    // [channel block][pass][channel][runs, vectors] → [K, taps × C | bias]
    float* to = partial + unit * s.K * (taps + 1);
    const float* src = dw.data;
    for (int64_t k0 = 0; k0 < s.K; k0 += k_block)
      for (const Pass& pass : passes)
        for (int64_t k = k0; k < std::min(k0 + k_block, s.K); ++k)
          for (int64_t r = 0; r < pass.runs; ++r, src += pass.vecs * L) {
            const int64_t at = pass.vec * L, n = std::min(pass.vecs * L, runs.length - at);
            std::copy_n(src, n, to + k * (taps + 1) + (pass.run + r) * runs.length + at);
          }
    for (int64_t k = 0; k < s.K; ++k) to[k * (taps + 1) + taps] = db[k];
  }
}

// ------------------------------------------------------------------------------- backward: input

// Lane numbers of the set bits of a byte, packed to the front.
struct CompressTable {
  uint8_t lane[256][8] = {};
  constexpr CompressTable() {
    for (int bits = 0; bits < 256; ++bits)
      for (int i = 0, n = 0; i < 8; ++i)
        if (bits >> i & 1) lane[bits][n++] = static_cast<uint8_t>(i);
  }
};
inline constexpr CompressTable kCompress;

// The lanes of x whose bit is set go to g, their numbers (from `first` on) to channel; returns how
// many. Writes a whole vector; what lies behind the chosen ones means nothing.
[[gnu::always_inline]] inline int64_t store_chosen(Vec x, unsigned bits, uint8_t first, float* g,
                                                   uint8_t* channel) {
  for (int half = 0; half < L; half += 8) {
    const __m128i lanes =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lane[bits >> half & 255]));
    const int64_t n = half == 0 ? 0 : __builtin_popcount(bits & 255);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(channel + n),
                     _mm_add_epi8(lanes, _mm_set1_epi8(static_cast<char>(first + half))));
#if defined(FASTCLS_AVX512)
    if (half == 0) _mm512_mask_compressstoreu_ps(g, static_cast<__mmask16>(bits), x.v);
#else
    _mm256_storeu_ps(g, _mm256_permutevar8x32_ps(x.v, _mm256_cvtepu8_epi32(lanes)));
#endif
  }
  return __builtin_popcount(bits);
}

// The open channels of some windows, by winner: window p and place q have `count` entries of g and
// channel from (p · places + q) · capacity on.
struct Buckets {
  Scratch<float> g;
  Scratch<uint8_t> channel;
  std::vector<int32_t> count;
  int64_t capacity = 0;

  // grad and codes [pixels, stride] start at the block's first channel.
  void fill(int64_t pixels, int64_t places, int64_t channels, const float* grad,
            const uint8_t* codes, int64_t stride) {
    capacity = round_up(channels, L);
    g.reserve(pixels * places * capacity + L), channel.reserve(pixels * places * capacity + L);
    count.assign(pixels * places, 0);
    for (int64_t p = 0; p < pixels; ++p) {
      int32_t* n = count.data() + p * places;
      float* to = g.data + p * places * capacity;
      uint8_t* to_channel = channel.data + p * places * capacity;
      for (int64_t k = 0; k < channels; k += L) {
        const Vec value = Vec::load(grad + p * stride + k);
        unsigned open = (1u << std::min<int64_t>(L, channels - k)) - 1;
        open &= ~Vec::bits(Vec::equal(value, Vec::zero()));  // dropout leaves many zeros
        const Vec code = codes ? Vec::load(codes + p * stride + k) : Vec::zero();
        for (int64_t q = 0; q < places; ++q) {
          const unsigned bits = open & Vec::bits(Vec::equal(code, Vec::set(float(q))));
          n[q] += store_chosen(value, bits, k, to + q * capacity + n[q],
                               to_channel + q * capacity + n[q]);
        }
      }
    }
  }
};

// Channels whose weights of one pass, kMaxSums vectors each, fill three quarters of a 32 KiB
// first-level cache.
constexpr int64_t kInputBlock = 24576 / (kMaxSums * L * 4) / L * L;

// [channel block][pass][channel][runs, vectors], zero past each run.
inline void pack_backward_weight(const ConvBlockShape& s, const Runs& runs,
                                 const std::vector<Pass>& passes, const float* weight,
                                 float* packed) {
  const int64_t taps = s.kernel_h * s.kernel_w * s.C;
  for (int64_t k0 = 0; k0 < s.K; k0 += kInputBlock)
    for (const Pass& pass : passes)
      for (int64_t k = k0; k < std::min(k0 + kInputBlock, s.K); ++k)
        for (int64_t r = 0; r < pass.runs; ++r, packed += pass.vecs * L) {
          const int64_t at = pass.vec * L, n = std::min(pass.vecs * L, runs.length - at);
          std::fill_n(packed, pass.vecs * L, 0.f);
          std::copy_n(weight + k * taps + (pass.run + r) * runs.length + at, n, packed);
        }
}

template <typename T>
void backward_input(const ConvBlockShape& s, const View4<const T>& grad_out, const float* weight,
                    const uint8_t* winner, const View4<T>& grad_input, int64_t begin, int64_t end) {
  const Runs runs(s);
  const std::vector<Pass> passes = passes_over(runs);
  const int64_t row = (s.W + 2 * s.pad_w) * s.C, height = s.H + 2 * s.pad_h;
  const int64_t padded_K = round_up(s.K, L), places = winner ? s.window() : 1;
  const int64_t l1_rows = rows_in_l1(s);
  int64_t sums = 0;
  for (const Pass& pass : passes) sums += pass.sums() * L;

  Scratch<float> packed_weight, dx, grad;
  Scratch<uint8_t> codes;
  Buckets buckets;
  packed_weight.reserve(s.K * sums);
  pack_backward_weight(s, runs, passes, weight, packed_weight.data);
  dx.reserve(height * row);
  grad.reserve(l1_rows * s.out_w * padded_K);
  codes.reserve(l1_rows * s.out_w * padded_K);
  std::vector<int64_t> place(places), window_base(l1_rows * s.out_w);
  for (int64_t q = 0; q < places; ++q) place[q] = place_offset(s, q);
  for (int64_t p = 0; p < l1_rows * s.out_w; ++p)
    window_base[p] = window_offset(s, p / s.out_w, p % s.out_w, 0);
  const int64_t window_row = s.pool_stride_h * s.stride_h * row;

  for (int64_t n = begin; n < end; ++n) {
    std::fill_n(dx.data, height * row, 0.f);
    for (int64_t p0 = 0; p0 < s.out_h; p0 += l1_rows) {
      const int64_t rows = std::min(l1_rows, s.out_h - p0), pixels = rows * s.out_w;
      pack_pixels(grad_out, n, p0, rows, s.out_w, s.K, grad.data, s.out_w * padded_K, padded_K);
      if (winner)
        for (int64_t p = 0; p < pixels; ++p)
          std::copy_n(winner + ((n * s.out_h + p0) * s.out_w + p) * s.K, s.K,
                      codes.data + p * padded_K);
      const float* w = packed_weight.data;
      for (int64_t k0 = 0; k0 < s.K; k0 += kInputBlock) {
        const int64_t channels = std::min(kInputBlock, s.K - k0);
        buckets.fill(pixels, places, channels, grad.data + k0, winner ? codes.data + k0 : nullptr,
                     padded_K);
        for (const Pass& pass : passes) {
          const AddChannels add = add_channels_for(pass);
          const int64_t tail = std::min<int64_t>(runs.length - (pass.vec + pass.vecs - 1) * L, L);
          for (int64_t p = 0, bucket = 0; p < pixels; ++p) {
            float* window = dx.data + pass.vec * L + window_base[p] + p0 * window_row;
            for (int64_t q = 0; q < places; ++q, ++bucket) {
              const int64_t at = bucket * buckets.capacity;
              if (buckets.count[bucket] > 0)
                add(window + place[q], runs.offset.data() + pass.run, w, buckets.g.data + at,
                    buckets.channel.data + at, buckets.count[bucket], tail);
            }
          }
          w += channels * pass.sums() * L;
        }
      }
    }
    unpack_pixels(dx.data + s.pad_h * row + s.pad_w * s.C, row, s.C, grad_input, n, 0, s.H, s.W,
                  s.C);
  }
}

template <typename T>
ConvBlockKernels<T> conv_block_kernels() {
  return {winograd_serves, forward<T>, backward_weight<T>, backward_input<T>};
}
template ConvBlockKernels<float> conv_block_kernels<float>();
template ConvBlockKernels<BFloat16> conv_block_kernels<BFloat16>();
template ConvBlockKernels<Half> conv_block_kernels<Half>();
