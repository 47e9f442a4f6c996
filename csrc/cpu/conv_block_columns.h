// Conv blocks of few output channels, which would leave most of a vector of channels empty: here
// vectors run over columns of the conv map, forward and dW. Part of conv_block_kernels.h.
//
// The inner layout is by channel: planes [C, rows, width] of zero-padded float, so wide that no
// vector reads past its row. Outputs, winners and gradients are rows of one channel, too, until
// they are brought home.

constexpr int64_t kFewChannels = 8;      // bytes of a pixel's winners go in one register
constexpr int64_t kMostKernelWidth = 7;  // sums of a kernel row stay in registers

// Columns of a pair of vectors, half as many pooled ones.
constexpr int64_t kPairColumns = 2 * L;

inline int64_t map_columns(const ConvBlockShape& s) { return round_up(2 * s.out_w, kPairColumns); }

// From one channel's pooled numbers of a band to the next one's: a vector may reach past the last.
inline int64_t rows_stride(const ConvBlockShape& s, int64_t band) {
  return round_up(band * s.out_w, L) + L;
}

// 2 × 2 windows that tile the map, and fewer empty lanes than with vectors of channels.
inline bool columns_serve(const ConvBlockShape& s) {
  const bool plain = s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
  return windows_are_2x2(s) && plain && s.K <= kFewChannels && s.kernel_w <= kMostKernelWidth &&
         s.K * map_columns(s) < round_up(s.K, L) * 2 * s.out_w;
}

// ---------------------------------------------------------------------------- layout

// Even and odd columns of two vectors that follow each other, and the way back.
#if defined(FASTCLS_AVX512)
inline __m512i every_second(int first) {
  return _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16,
                                                                      18, 20, 22, 24, 26, 28, 30));
}
inline Vec even_columns(Vec a, Vec b) {
  return {_mm512_permutex2var_ps(a.v, every_second(0), b.v)};
}
inline Vec odd_columns(Vec a, Vec b) { return {_mm512_permutex2var_ps(a.v, every_second(1), b.v)}; }
inline void interleave_columns(Vec even, Vec odd, Vec* a, Vec* b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  a->v = _mm512_permutex2var_ps(even.v, low, odd.v);
  b->v = _mm512_permutex2var_ps(even.v, high, odd.v);
}
#else
inline Vec in_order(__m256 v) {
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8))};
}
inline Vec even_columns(Vec a, Vec b) { return in_order(_mm256_shuffle_ps(a.v, b.v, 0x88)); }
inline Vec odd_columns(Vec a, Vec b) { return in_order(_mm256_shuffle_ps(a.v, b.v, 0xdd)); }
inline void interleave_columns(Vec even, Vec odd, Vec* a, Vec* b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  a->v = _mm256_permute2f128_ps(low, high, 0x20), b->v = _mm256_permute2f128_ps(low, high, 0x31);
}
#endif

// Transposes 16 rows of 8 bytes: r[k] gets byte k of all of them.
inline void transpose_bytes(const __m128i (&pixel)[16], __m128i (&r)[8]) {
  __m128i pairs[8], quads[8];
  for (int i = 0; i < 8; ++i) pairs[i] = _mm_unpacklo_epi8(pixel[i], pixel[8 + i]);
  for (int i = 0; i < 4; ++i) {
    quads[2 * i] = _mm_unpacklo_epi8(pairs[i], pairs[4 + i]);
    quads[2 * i + 1] = _mm_unpackhi_epi8(pairs[i], pairs[4 + i]);
  }
  // quads[2 i + h]: pixels i, 4 + i, 8 + i, 12 + i, mixed, of channels 4 h … 4 h + 3.
  for (int h = 0; h < 2; ++h) {
    const __m128i even_low = _mm_unpacklo_epi8(quads[h], quads[4 + h]);
    const __m128i even_high = _mm_unpackhi_epi8(quads[h], quads[4 + h]);
    const __m128i odd_low = _mm_unpacklo_epi8(quads[2 + h], quads[6 + h]);
    const __m128i odd_high = _mm_unpackhi_epi8(quads[2 + h], quads[6 + h]);
    r[4 * h] = _mm_unpacklo_epi8(even_low, odd_low);
    r[4 * h + 1] = _mm_unpackhi_epi8(even_low, odd_low);
    r[4 * h + 2] = _mm_unpacklo_epi8(even_high, odd_high);
    r[4 * h + 3] = _mm_unpackhi_epi8(even_high, odd_high);
  }
}

// Winners [pixels, K] → [K, stride], and back. Sixteen pixels at once move eight bytes each, as
// long as those are inside; the rest goes byte by byte.
inline void winners_to_rows(const uint8_t* src, int64_t pixels, int64_t K, uint8_t* dst,
                            int64_t stride) {
  int64_t p = 0;
  for (; (p + 15) * K + 8 <= pixels * K; p += 16) {
    __m128i pixel[16], r[8];
    for (int i = 0; i < 16; ++i)
      pixel[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(src + (p + i) * K));
    transpose_bytes(pixel, r);
    for (int64_t k = 0; k < K; ++k)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + k * stride + p), r[k]);
  }
  for (; p < pixels; ++p)
    for (int64_t k = 0; k < K; ++k) dst[k * stride + p] = src[p * K + k];
}
inline void rows_to_winners(const uint8_t* src, int64_t stride, int64_t pixels, int64_t K,
                            uint8_t* dst) {
  int64_t p = 0;
  for (; (p + 15) * K + 8 <= pixels * K; p += 16) {
    __m128i r[8];
    for (int64_t k = 0; k < 8; ++k)
      r[k] =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + std::min(k, K - 1) * stride + p));
    // Pixel by pixel, eight bytes each, in three steps of interleaving.
    __m128i pairs[8], quads[8];
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = _mm_unpacklo_epi8(r[i], r[4 + i]);
      pairs[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[4 + i]);
    }
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < 2; ++i) {
        quads[4 * h + 2 * i] = _mm_unpacklo_epi8(pairs[2 * i + h], pairs[4 + 2 * i + h]);
        quads[4 * h + 2 * i + 1] = _mm_unpackhi_epi8(pairs[2 * i + h], pairs[4 + 2 * i + h]);
      }
    for (int h = 0; h < 2; ++h)
      for (int j = 0; j < 2; ++j) {
        const __m128i even = quads[4 * h + j], odd = quads[4 * h + 2 + j];
        const __m128i low = _mm_unpacklo_epi8(even, odd), high = _mm_unpackhi_epi8(even, odd);
        uint8_t* to = dst + (p + 8 * h + 4 * j) * K;
        // In ascending order: what a pixel writes past its K bytes the next one writes again.
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), low);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + K), _mm_unpackhi_epi64(low, low));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * K), high);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 3 * K), _mm_unpackhi_epi64(high, high));
      }
  }
  for (; p < pixels; ++p)
    for (int64_t k = 0; k < K; ++k) dst[p * K + k] = src[k * stride + p];
}

// Zero-padded planes of the input of a band.
struct Planes {
  int64_t width, rows;  // of each
  Scratch<float> memory;

  Planes(const ConvBlockShape& s, int64_t band)
      : width(std::max(s.W + 2 * s.pad_w, map_columns(s) + s.kernel_w - 1)),
        rows(2 * band + s.kernel_h - 1) {
    memory.reserve(s.C * rows * width);
    std::fill_n(memory.data, s.C * rows * width, 0.f);
  }

  const float* row(int64_t c, int64_t r) const { return memory.data + (c * rows + r) * width; }

  // Rows from `first` on, counted from the top of the padding, of image n.
  template <typename T>
  void pack(const ConvBlockShape& s, const View4<const T>& x, int64_t n, int64_t first,
            int64_t count) {
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t r = 0; r < count; ++r) {
        float* to = memory.data + (c * rows + r) * width + s.pad_w;
        const int64_t h = first + r - s.pad_h;
        if (h < 0 || h >= s.H) {
          std::fill_n(to, s.W, 0.f);
        } else if (const T* src = x.at(n, c, h, 0); x.w == 1) {
          copy_row(src, s.W, to);
        } else {
          for (int64_t w = 0; w < s.W; ++w) to[w] = static_cast<float>(src[w * x.w]);
        }
      }
  }
};

// ---------------------------------------------------------------------------- forward

// Output channels whose sums, of two rows and two vectors each, are in registers together.
constexpr int kChannelsTogether = L == 16 ? 6 : 3;

// y[row][vector][channel] of two rows of the conv map from row r, column w on, for kK channels with
// weights [C, kernel_h, kernel_w, kK]. A row of the input is loaded for both.
template <int kK>
[[gnu::always_inline]] inline void conv_rows(const ConvBlockShape& s, const Planes& x, int64_t r,
                                             int64_t w, const float* weight, const float* bias,
                                             Vec (&y)[2][2][kK]) {
  for (int k = 0; k < kK; ++k)
    y[0][0][k] = y[0][1][k] = y[1][0][k] = y[1][1][k] = Vec::set(bias[k]);
  const int64_t tap_row = s.kernel_w * kK;
  const auto add = [&](const float* src, auto upper, auto lower, const float* at)
                       __attribute__((always_inline)) {
                         for (int64_t j = 0; j < s.kernel_w; ++j, at += kK) {
                           const Vec left = Vec::load(src + j), right = Vec::load(src + j + L);
#pragma GCC unroll 6
                           for (int k = 0; k < kK; ++k) {
                             if constexpr (upper) {
                               const Vec factor = Vec::set(at[k]);
                               y[0][0][k] = Vec::fma(left, factor, y[0][0][k]);
                               y[0][1][k] = Vec::fma(right, factor, y[0][1][k]);
                             }
                             if constexpr (lower) {
                               const Vec factor = Vec::set(at[k - tap_row]);
                               y[1][0][k] = Vec::fma(left, factor, y[1][0][k]);
                               y[1][1][k] = Vec::fma(right, factor, y[1][1][k]);
                             }
                           }
                         }
                       };
  constexpr std::true_type kYes;
  constexpr std::false_type kNo;
  for (int64_t c = 0; c < s.C; ++c, weight += s.kernel_h * tap_row) {
    add(x.row(c, r) + w, kYes, kNo, weight);
    for (int64_t i = 1; i < s.kernel_h; ++i)
      add(x.row(c, r + i) + w, kYes, kYes, weight + i * tap_row);
    add(x.row(c, r + s.kernel_h) + w, kNo, kYes, weight + s.kernel_h * tap_row);
  }
}

// Pooled rows of kK channels into rows [kK, stride].
template <int kK>
void pool_columns(const ConvBlockShape& s, const Planes& x, int64_t rows, const float* weight,
                  const float* bias, float* value, uint8_t* code, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < s.out_w; w += L) {
      Vec y[2][2][kK];
      conv_rows<kK>(s, x, 2 * r, 2 * w, weight, bias, y);
#pragma GCC unroll 6
      for (int k = 0; k < kK; ++k) {
        const Vec window[4] = {
            even_columns(y[0][0][k], y[0][1][k]), odd_columns(y[0][0][k], y[0][1][k]),
            even_columns(y[1][0][k], y[1][1][k]), odd_columns(y[1][0][k], y[1][1][k])};
        const Results to{value + k * stride, code ? code + k * stride : nullptr, 1};
        store_window(s.relu, window, to, r * s.out_w + w, 0);
      }
    }
}

using PoolColumns = void (*)(const ConvBlockShape&, const Planes&, int64_t, const float*,
                             const float*, float*, uint8_t*, int64_t);
template <int... kLessOne>
PoolColumns pool_columns_of(int64_t channels, std::integer_sequence<int, kLessOne...>) {
  static constexpr PoolColumns kTable[] = {pool_columns<kLessOne + 1>...};
  return kTable[channels - 1];
}

// Output channels as equal parts of at most kChannelsTogether.
struct ChannelParts {
  int64_t K, count;
  explicit ChannelParts(int64_t channels, int64_t most)
      : K(channels), count((channels + most - 1) / most) {}
  int64_t begin(int64_t part) const { return part * K / count; }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

// For each part [C, taps, channels of the part].
inline void pack_by_part(const ConvBlockShape& s, const DenseWeight& weight, float* to) {
  const ChannelParts parts(s.K, kChannelsTogether);
  const int64_t taps = s.kernel_h * s.kernel_w;
  for (int64_t part = 0; part < parts.count; ++part)
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t k = parts.begin(part); k < parts.begin(part + 1); ++k)
          *to++ = weight.data[k * s.C * taps + c * weight.channel + t * weight.tap];
}

// Rows [K, stride] of pooled rows from p0 on of image n into out.
template <typename T>
void rows_home(const ConvBlockShape& s, const float* value, int64_t stride, const View4<T>& out,
               int64_t n, int64_t p0, int64_t pixels) {
  for (int64_t k = 0; k < s.K; ++k) {
    T* to = out.at(n, k, p0, 0);
    if (out.w == 1)
      copy_row(value + k * stride, pixels, to);
    else
      for (int64_t p = 0; p < pixels; ++p) to[p * out.w] = static_cast<T>(value[k * stride + p]);
  }
}

template <typename T>
void forward_columns(const ConvBlockShape& s, const View4<const T>& x, const float* packed,
                     const float* bias, const View4<T>& out, uint8_t* winner,
                     const ForwardUnits& units, int64_t begin, int64_t end) {
  const ChannelParts parts(s.K, kChannelsTogether);
  const int64_t band = units.rows, bands = units.bands, stride = rows_stride(s, band);
  const int64_t weights = s.C * s.kernel_h * s.kernel_w;
  Planes planes(s, band);
  Scratch<float> value;
  Scratch<uint8_t> code;
  value.reserve(s.K * stride), code.reserve(s.K * stride);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t rows = std::min(band, s.out_h - p0), pixels = rows * s.out_w;
    planes.pack(s, x, n, 2 * p0, 2 * rows + s.kernel_h - 1);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t k = parts.begin(part);
      pool_columns_of(parts.size(part), std::make_integer_sequence<int, kChannelsTogether>())(
          s, planes, rows, packed + k * weights, bias + k, value.data + k * stride,
          winner ? code.data + k * stride : nullptr, stride);
    }
    rows_home(s, value.data, stride, out, n, p0, pixels);
    if (winner)
      rows_to_winners(code.data, stride, pixels, s.K, winner + (n * s.out_h + p0) * s.out_w * s.K);
  }
}

// ---------------------------------------------------------------------------- gradient of weight

inline float sum_of_lanes(Vec sum) {
  float lanes[L], total = 0;
  sum.store(lanes);
  for (float lane : lanes) total += lane;
  return total;
}

// The gradient of the conv map of a band: rows [K, 2 band, width], zero but for winners.
struct ConvGradient {
  int64_t width, stride;
  Scratch<float> map, pooled;
  Scratch<uint8_t> code;

  ConvGradient(const ConvBlockShape& s, int64_t band)
      : width(map_columns(s)), stride(rows_stride(s, band)) {
    map.reserve(s.K * 2 * band * width);
    pooled.reserve(s.K * stride), code.reserve(s.K * stride);
    std::fill_n(pooled.data, s.K * stride, 0.f);
  }

  // Pooled rows from p0 on of image n; adds their sums to db [K].
  template <typename T>
  void fill(const ConvBlockShape& s, const View4<const T>& grad, const uint8_t* winner, int64_t n,
            int64_t p0, int64_t rows, int64_t band, float* db) {
    const int64_t pixels = rows * s.out_w;
    winners_to_rows(winner + (n * s.out_h + p0) * s.out_w * s.K, pixels, s.K, code.data, stride);
    for (int64_t k = 0; k < s.K; ++k) {
      float* to = pooled.data + k * stride;
      for (int64_t r = 0; r < rows; ++r) {
        const T* src = grad.at(n, k, p0 + r, 0);
        if (grad.w == 1)
          copy_row(src, s.out_w, to + r * s.out_w);
        else
          for (int64_t w = 0; w < s.out_w; ++w)
            to[r * s.out_w + w] = static_cast<float>(src[w * grad.w]);
      }
      Vec sum = Vec::zero();
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t w = 0; w < s.out_w; w += L)
          sum = sum + expand(k, r * s.out_w + w, std::min<int64_t>(s.out_w - w, L),
                             map.data + (k * 2 * band + 2 * r) * width + 2 * w);
      db[k] += sum_of_lanes(sum);
    }
  }

 private:
  // `count` pooled gradients of channel k from p on to two rows of the map; returns those that
  // pass.
  Vec expand(int64_t k, int64_t p, int64_t count, float* to) const {
    const Vec grad = Vec::select(Vec::first(static_cast<int>(count)),
                                 Vec::load(pooled.data + k * stride + p), Vec::zero());
    const Vec place = Vec::load(code.data + k * stride + p);
    Vec mine[4];
    for (int q = 0; q < 4; ++q)
      mine[q] = Vec::select(Vec::equal(place, Vec::set(float(q))), grad, Vec::zero());
    for (int row = 0; row < 2; ++row) {
      Vec left, right;
      interleave_columns(mine[2 * row], mine[2 * row + 1], &left, &right);
      left.store(to + row * width), right.store(to + row * width + L);
    }
    return (mine[0] + mine[1]) + (mine[2] + mine[3]);
  }
};

// dw[k][j] += Σ over rows and columns of g[k] · x shifted by j, for kK channels and one kernel row
// of width kWidth; dw [kK, kWidth] vectors of partial sums by column.
template <int kK, int kWidth>
void add_kernel_row(const float* x, int64_t x_row, const float* g, int64_t g_channel, int64_t g_row,
                    int64_t rows, Vec* dw) {
  Vec sum[kK][kWidth];
  for (int k = 0; k < kK; ++k)
    for (int j = 0; j < kWidth; ++j) sum[k][j] = dw[k * kWidth + j];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < g_row; w += L) {
      Vec grad[kK];
      for (int k = 0; k < kK; ++k) grad[k] = Vec::load(g + k * g_channel + r * g_row + w);
#pragma GCC unroll 7
      for (int j = 0; j < kWidth; ++j) {
        Vec value = Vec::load(x + r * x_row + w + j);
        keep_in_step(value);  // or it would be loaded for each channel
#pragma GCC unroll 3
        for (int k = 0; k < kK; ++k) sum[k][j] = Vec::fma(grad[k], value, sum[k][j]);
      }
    }
  for (int k = 0; k < kK; ++k)
    for (int j = 0; j < kWidth; ++j) dw[k * kWidth + j] = sum[k][j];
}

// Channels whose kernel rows are in registers together: 3 · 7 + 3 + 1 of 32, 2 · 5 + 2 + 1 of 16.
constexpr int gradients_together(int width) { return L == 16 ? 3 : width <= 5 ? 2 : 1; }

using AddKernelRow = void (*)(const float*, int64_t, const float*, int64_t, int64_t, int64_t, Vec*);
template <int kWidth>
AddKernelRow add_kernel_row_of(int64_t channels) {
  if constexpr (gradients_together(kWidth) >= 3)
    if (channels == 3) return add_kernel_row<3, kWidth>;
  if constexpr (gradients_together(kWidth) >= 2)
    if (channels == 2) return add_kernel_row<2, kWidth>;
  return add_kernel_row<1, kWidth>;
}
template <int... kLessOne>
AddKernelRow add_kernel_row_for(int64_t channels, int64_t width,
                                std::integer_sequence<int, kLessOne...>) {
  using Chosen = AddKernelRow (*)(int64_t);
  static constexpr Chosen kTable[] = {add_kernel_row_of<kLessOne + 1>...};
  return kTable[width - 1](channels);
}

template <typename T>
void backward_weight_columns(const ConvBlockShape& s, const View4<const T>& grad_out,
                             const View4<const T>& x, const uint8_t* winner, float* partial,
                             int64_t chunk, int64_t begin, int64_t end) {
  // The gradient of a band's conv map stays in a first-level cache of 32 KiB, or is two rows.
  const int64_t band = std::clamp<int64_t>(8192 / (s.K * 2 * map_columns(s)), 1, s.out_h);
  const ChannelParts parts(s.K, gradients_together(static_cast<int>(s.kernel_w)));
  const int64_t elements = s.kernel_h * s.kernel_w * s.C, kernel_rows = s.C * s.kernel_h;
  Planes planes(s, band);
  ConvGradient grad(s, band);
  Scratch<Vec> dw;  // [part][C, kernel_h][channel of the part, kernel_w]
  std::vector<float> db(s.K);
  dw.reserve(s.K * elements);
  for (int64_t unit = begin; unit < end; ++unit) {
    std::fill_n(dw.data, s.K * elements, Vec::zero());
    std::fill(db.begin(), db.end(), 0.f);
    for (int64_t n = unit * chunk; n < std::min((unit + 1) * chunk, s.N); ++n)
      for (int64_t p0 = 0; p0 < s.out_h; p0 += band) {
        const int64_t rows = std::min(band, s.out_h - p0);
        planes.pack(s, x, n, 2 * p0, 2 * rows + s.kernel_h - 1);
        grad.fill(s, grad_out, winner, n, p0, rows, band, db.data());
        for (int64_t part = 0; part < parts.count; ++part) {
          const int64_t k = parts.begin(part), channels = parts.size(part);
          const AddKernelRow add = add_kernel_row_for(
              channels, s.kernel_w, std::make_integer_sequence<int, kMostKernelWidth>());
          for (int64_t at = 0; at < kernel_rows; ++at)
            add(planes.row(at / s.kernel_h, at % s.kernel_h), planes.width,
                grad.map.data + k * 2 * band * grad.width, 2 * band * grad.width, grad.width,
                2 * rows, dw.data + k * elements + at * channels * s.kernel_w);
        }
      }
    float* to = partial + unit * s.K * (elements + 1);
    for (int64_t part = 0; part < parts.count; ++part)
      for (int64_t c = 0; c < s.C; ++c)
        for (int64_t i = 0; i < s.kernel_h; ++i)
          for (int64_t k = 0; k < parts.size(part); ++k)
            for (int64_t j = 0; j < s.kernel_w; ++j) {
              const Vec sum =
                  dw.data[parts.begin(part) * elements +
                          ((c * s.kernel_h + i) * parts.size(part) + k) * s.kernel_w + j];
              to[(parts.begin(part) + k) * (elements + 1) + (i * s.kernel_w + j) * s.C + c] =
                  sum_of_lanes(sum);
            }
    for (int64_t k = 0; k < s.K; ++k) to[k * (elements + 1) + elements] = db[k];
  }
}
