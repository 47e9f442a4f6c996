// Backward kernels of the conv block over Vec; part of conv_block_kernels.h.

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
      pixels_to_channels(winner + (n * s.out_h + p0) * s.out_w * s.K, {pixels, 0, s.K}, s.K, pixels,
                         code.data + column, stride);
    const bool one_row = grad.h == s.out_w * grad.w;
    const int64_t width = one_row ? pixels : s.out_w;
    for (int64_t r = 0; r < (one_row ? 1 : p1 - p0); ++r) {
      const T* src = grad.at(n, 0, p0 + r, 0);
      float* dst = g.data + column + r * width;
      if (grad.w == 1)
        for (int64_t k = 0; k < s.K; ++k) copy_row(src + k * grad.c, width, dst + k * stride);
      else if (grad.c == 1)
        pixels_to_channels(src, {width, 0, grad.w}, s.K, width, dst, stride);
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
        pack_pixels(grad_out, n, p0, rows, s.K, grad.data,
                    {s.out_w, s.out_w * padded_K, padded_K});
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
      pack_pixels(grad_out, n, p0, rows, s.K, grad.data,
                    {s.out_w, s.out_w * padded_K, padded_K});
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
    unpack_pixels(dx.data + s.pad_h * row + s.pad_w * s.C, {s.W, row, s.C}, grad_input, n, 0, s.H,
                  s.C);
  }
}
