// Forward kernels of the conv block over Vec; part of conv_block_kernels.h.

inline bool windows_are_2x2(const ConvBlockShape& s) {
  return s.pool_h == 2 && s.pool_w == 2 && s.pool_stride_h == 2 && s.pool_stride_w == 2 &&
         s.pool_pad_h == 0 && s.pool_pad_w == 0 && 2 * s.out_h <= s.conv_h &&
         2 * s.out_w <= s.conv_w;
}
inline bool has_no_pool(const ConvBlockShape& s) {
  return s.window() == 1 && s.pool_stride_h == 1 && s.pool_stride_w == 1;
}
// Does Winograd's algorithm pay? There are at least 16 input channels to spread the transforms
// over, in whole vectors.
inline bool winograd_serves(const ConvBlockShape& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && (windows_are_2x2(s) || has_no_pool(s)) &&
         s.C % L == 0 && s.C >= 16 && s.K >= 16;
}

inline bool needs_conv_rows(const ConvBlockShape& s) {
  return !windows_are_2x2(s) && !has_no_pool(s);
}

// Register tile: kPixels conv-map positions × kVecs vectors of output channels. AVX2 has 16
// registers: 4 · 3 sums + 3 weights + 1 broadcast = 16. AVX-512 has 32: 4 · 4 + 4 + 1 = 21. With
// one vector of channels there are 8 positions: a sum is ready for its next addition after 4
// cycles, in which 8 can be made.
template <int kVecs>
constexpr int kPixels = kVecs == 1 ? 8 : 4;
constexpr int kMaxVecs = L == 16 ? 4 : 3;

// The same where the positions are those of a row: with AVX-512 12 · 2 + 2 + 1 = 27 registers. A
// large kernel's weights come from the second-level cache for every tile: the more positions it
// has, the fewer bytes there are to a multiply-add. Of kMaxRowPixels and less, a row takes what
// fills it.
constexpr int kMaxRowVecs = L == 16 ? 2 : 3;
template <int kVecs>
constexpr int kMaxRowPixels = L == 16 ? 12 : kPixels<kVecs>;
constexpr int kMinRowPixels = 4;

// Blocks of output channels, as equal as possible.
struct ChannelBlocks {
  int64_t vecs, count;
  explicit ChannelBlocks(const ConvBlockShape& s) : vecs((s.K + L - 1) / L) {
    const int64_t most = windows_are_2x2(s) || winograd_serves(s) ? kMaxVecs : kMaxRowVecs;
    count = (vecs + most - 1) / most;
  }
  int64_t begin(int64_t b) const { return b * (vecs / count) + std::min(b, vecs % count); }
};

// [block][run, position in the run][block's channels]: the order in which a tile reads it.
inline void pack_forward_weight(const ConvBlockShape& s, const float* weight, float* packed) {
  const int64_t row = s.kernel_h * s.kernel_w * s.C;
  const ChannelBlocks blocks(s);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t k0 = blocks.begin(b) * L, width = blocks.begin(b + 1) * L - k0;
    const int64_t channels = std::min(width, s.K - k0);
    if (channels < width) std::fill_n(packed, row * width, 0.f);
    channels_to_pixels(weight + k0 * row, row, channels, row, packed, {row, 0, width});
    packed += row * width;
  }
}

template <int kVecs, int kCount = kPixels<kVecs>>
struct Tile {
  Vec sum[kCount][kVecs];
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

// Where the positions of a tile lie: in pairs `step` floats apart, two pairs `pair` floats apart,
// and four positions `four` floats from the next four. Windows of 2 × 2 side by side (pair = one
// conv row, four = 2 step), or a row of positions (pair = 2 step, four = 4 step).
struct Positions {
  int64_t step, pair, four;
};

// The value is calculated here. Where a loop is unrolled the compiler would else load the operands
// of all steps first, into the stack, and then go through one sum after the other.
[[gnu::always_inline]] inline void keep_in_step(Vec& x) { asm volatile("" : "+v"(x.v)); }

template <int kVecs, typename Taps = AnyTaps, int kCount = kPixels<kVecs>>
[[gnu::always_inline]] inline void conv_tile(const float* x, const Positions& at, const Runs& runs,
                                             const float* w, const float* bias,
                                             Tile<kVecs, kCount>& tile) {
  const int64_t run_count = Taps::runs ? Taps::runs : runs.count;
  const int64_t run_length = Taps::length ? Taps::length : runs.length;
  Vec sum[kCount][kVecs];
  for (int v = 0; v < kVecs; ++v)
    for (int p = 0; p < kCount; ++p) sum[p][v] = Vec::load(bias + v * L);
#pragma GCC unroll 3
  for (int64_t r = 0; r < run_count; ++r) {
    const float* x0 = x + runs.offset[r];
    const float* x2 = x0 + at.pair;
    const float* const four[4] = {x0, x0 + at.step, x2, x2 + at.step};
#pragma GCC unroll 9
    for (int64_t e = 0; e < run_length; ++e, w += kVecs * L) {
      Vec weight[kVecs];
      for (int v = 0; v < kVecs; ++v) weight[v] = Vec::load(w + v * L);
#pragma GCC unroll 12
      for (int p = 0; p < kCount; ++p) {
        const Vec value = Vec::set(four[p % 4][e + p / 4 * at.four]);
        for (int v = 0; v < kVecs; ++v) sum[p][v] = Vec::fma(value, weight[v], sum[p][v]);
      }
      if constexpr (Taps::length > 0)
        for (int p = 0; p < kCount; ++p)
          for (int v = 0; v < kVecs; ++v) keep_in_step(sum[p][v]);
    }
  }
  for (int p = 0; p < kCount; ++p)
    for (int v = 0; v < kVecs; ++v) tile.sum[p][v] = sum[p][v];
}

// Few taps of few channels, stride 1: the weights stay in registers and each value under the tile
// is broadcast once for all positions that it belongs to: windows of 2 × 2 side by side. One
// channel and two vectors take 18 weights, 8 sums and 1 value of 32 registers; of the 27 weights of
// 3 × 3 × 3 taps a few are read from the stack.
template <int kVecs, typename Taps>
constexpr bool kWeightsStay = L == 16 && Taps::length > 0 && Taps::runs* Taps::length* kVecs <= 27;

// Is the patch under a tile one that conv_patch knows, pixel after pixel, row after row?
inline bool has_plain_taps(const ConvBlockShape& s) {
  return s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
}

template <int kVecs, typename Taps>
struct Weights {
  Vec at[Taps::runs * Taps::length][kVecs];
  Weights(const float* w) {
    for (int e = 0; e < Taps::runs * Taps::length; ++e)
      for (int v = 0; v < kVecs; ++v) at[e][v] = Vec::load(w + (e * kVecs + v) * L);
  }
};

template <int kVecs, typename Taps>
[[gnu::always_inline]] inline void conv_patch(const float* x, int64_t row,
                                              const Weights<kVecs, Taps>& weights,
                                              const float* bias, Tile<kVecs>& tile) {
  constexpr int kC = Taps::length / 3, kCount = kPixels<kVecs>, kCols = kCount / 2;
  Vec sum[kCount][kVecs];
  for (int p = 0; p < kCount; ++p)
    for (int v = 0; v < kVecs; ++v) sum[p][v] = Vec::load(bias + v * L);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 30
    for (int e = 0; e < (kCols + 2) * kC; ++e) {
      Vec value = Vec::set(x[i * row + e]);
      keep_in_step(value);  // one load for all multiply-adds, not one for each
#pragma GCC unroll 8
      for (int p = 0; p < kCount; ++p) {
        const int tap_row = i - p / kCols, tap = e - p % kCols * kC;
        if (tap_row < 0 || tap_row > 2 || tap < 0 || tap >= Taps::length) continue;
        for (int v = 0; v < kVecs; ++v) {
          sum[p][v] = Vec::fma(value, weights.at[tap_row * Taps::length + tap][v], sum[p][v]);
          keep_in_step(sum[p][v]);
        }
      }
    }
  for (int p = 0; p < kCount; ++p)
    for (int v = 0; v < kVecs; ++v) tile.sum[p][v] = sum[p][v];
}

constexpr int kShutCode = 255;

// PyTorch's rule: a greater value takes over, and so does every NaN.
[[gnu::always_inline]] inline void take_greater(Vec value, int place, Vec& best, Vec::Bytes& code) {
  const Vec::Mask takes = Vec::either(Vec::greater(value, best), Vec::is_nan(value));
  best = Vec::select(takes, value, best);
  code = Vec::select(takes, Vec::bytes(place), code);
}

[[gnu::always_inline]] inline void apply_relu(Vec& best, Vec::Bytes& code) {
  const Vec::Mask open = Vec::either(Vec::greater(best, Vec::zero()), Vec::is_nan(best));
  best = Vec::select(open, best, Vec::zero());
  code = Vec::select(open, code, Vec::bytes(kShutCode));
}

// By value, or every byte of a winner that is stored might have changed it.
// Where the results of a band go, [pixel, channel]: straight into out and winner where their rows
// are whole vectors of float, else into scratch.
struct Results {
  float* value;
  uint8_t* code;  // null: not wanted
  int64_t stride;

  [[gnu::always_inline]] void store(int64_t pixel, int vec, Vec best, Vec::Bytes place) const {
    best.store(value + pixel * stride + vec * L);
    if (code) place.store(code + pixel * stride + vec * L);
  }
};

// The maximum of a 2 × 2 window and the first place that has it, where no value is NaN: in two
// steps, not in four that wait for each other.
[[gnu::always_inline]] inline void take_maximum(const Vec (&y)[4], Vec& best, Vec::Bytes& code) {
  best = Vec::max(Vec::max(y[0], y[1]), Vec::max(y[2], y[3]));
  code = Vec::select(Vec::equal(y[2], best), Vec::bytes(2), Vec::bytes(3));
  code = Vec::select(Vec::equal(y[1], best), Vec::bytes(1), code);
  code = Vec::select(Vec::equal(y[0], best), Vec::bytes(0), code);
}

// Pool and ReLU of a whole 2 × 2 window.
[[gnu::always_inline]] inline void store_window(bool relu, const Vec (&y)[4], const Results& to,
                                                int64_t pixel, int vec) {
  Vec best = y[0];
  Vec::Bytes code = Vec::bytes(0);
  if (Vec::bits(Vec::either(Vec::unordered(y[0], y[1]), Vec::unordered(y[2], y[3])))) [[unlikely]]
    for (int p = 1; p < 4; ++p) take_greater(y[p], p, best, code);
  else
    take_maximum(y, best, code);
  if (relu) apply_relu(best, code);
  to.store(pixel, vec, best, code);
}

// The first place of the tile of `tile` places that covers place `at` of `count`: the last one
// starts further left, so that it ends with the row. A row shorter than a tile begins at 0; what
// lies past it is read, and those sums are dropped.
inline int64_t tile_begin(int64_t at, int64_t tile, int64_t count) {
  return std::max<int64_t>(std::min(at, count - tile), 0);
}

// Pool and ReLU for one block of channels, given the band's packed input.
template <int kVecs, typename Taps>
void windows_2x2(const ConvBlockShape& s, const float* x, const Runs& runs, const float* w,
                 const float* bias, int64_t rows, const Results to) {
  const bool relu = s.relu;
  const int64_t out_w = s.out_w;
  constexpr int kWindows = kPixels<kVecs> / 4;
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h, step = s.stride_w * s.C;
  const auto store = [&](int64_t ph, int64_t first, const Tile<kVecs>& tile, auto place) {
#pragma GCC unroll 2
    for (int i = 0; i < kWindows; ++i)
      if (first + i < out_w)
        for (int v = 0; v < kVecs; ++v) {
          const Vec y[4] = {tile.sum[place(i, 0)][v], tile.sum[place(i, 1)][v],
                            tile.sum[place(i, 2)][v], tile.sum[place(i, 3)][v]};
          store_window(relu, y, to, ph * out_w + first + i, v);
        }
  };
  if constexpr (kWeightsStay<kVecs, Taps>)
    if (has_plain_taps(s)) {
      constexpr int kCols = 2 * kWindows;
      const Weights<kVecs, Taps> weights(w);
      for (int64_t ph = 0; ph < rows; ++ph)
        for (int64_t pw = 0; pw < out_w; pw += kWindows) {
          const int64_t first = tile_begin(pw, kWindows, out_w);
          Tile<kVecs> tile;
          conv_patch<kVecs, Taps>(x + 2 * ph * row + 2 * first * step, row, weights, bias, tile);
          store(ph, first, tile, [](int i, int q) { return q / 2 * kCols + 2 * i + q % 2; });
        }
      return;
    }
  for (int64_t ph = 0; ph < rows; ++ph)
    for (int64_t pw = 0; pw < out_w; pw += kWindows) {
      const int64_t first = tile_begin(pw, kWindows, out_w);
      Tile<kVecs> tile;
      conv_tile<kVecs, Taps>(x + 2 * ph * row + 2 * first * step, {step, row, 2 * step}, runs, w,
                             bias, tile);
      store(ph, first, tile, [](int i, int q) { return 4 * i + q; });
    }
}

// Calls f(integral_constant of the positions in a tile): as few tiles to a row of the conv map as
// can be, all as wide as they must be.
template <int kVecs, int kCount = kMaxRowPixels<kVecs>, typename F>
void with_row_pixels(int64_t conv_w, const F& f) {
  constexpr int64_t kMost = kMaxRowPixels<kVecs>;
  const int64_t tiles = (conv_w + kMost - 1) / kMost;
  if constexpr (kCount > kMinRowPixels)
    if ((kCount - 1) * tiles >= conv_w) return with_row_pixels<kVecs, kCount - 1>(conv_w, f);
  f(std::integral_constant<int, kCount>{});
}

// epilogue(place in the row, sums) for one row of the conv map.
template <int kVecs, int kCount, typename Taps, typename Epilogue>
[[gnu::always_inline]] inline void conv_row_tiles(const ConvBlockShape& s, const float* x,
                                                  const Runs& runs, const float* w,
                                                  const float* bias, const Epilogue& epilogue) {
  const int64_t step = s.stride_w * s.C, pixels = std::min<int64_t>(kCount, s.conv_w);
  for (int64_t cw = 0; cw < s.conv_w; cw += kCount) {
    const int64_t first = tile_begin(cw, kCount, s.conv_w);
    Tile<kVecs, kCount> tile;
    conv_tile<kVecs, Taps, kCount>(x + first * step, {step, 2 * step, 4 * step}, runs, w, bias,
                                   tile);
    for (int64_t p = 0; p < pixels; ++p) epilogue(first + p, tile.sum[p]);
  }
}

template <int kVecs, int kCount, typename Taps>
void no_pool(const ConvBlockShape& s, const float* x, const Runs& runs, const float* w,
             const float* bias, int64_t rows, const Results to) {
  const bool relu = s.relu;
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h;
  for (int64_t h = 0; h < rows; ++h)
    conv_row_tiles<kVecs, kCount, Taps>(s, x + h * row, runs, w, bias,
                                        [&](int64_t cw, const Vec* sum) {
                                          const int64_t pixel = h * s.conv_w + cw;
                                          for (int v = 0; v < kVecs; ++v) {
                                            Vec best = sum[v];
                                            Vec::Bytes code = Vec::bytes(0);
                                            if (relu) apply_relu(best, code);
                                            to.store(pixel, v, best, code);
                                          }
                                        });
}

// Any window: the block's conv rows of the band go through `conv`, then the windows over it.
template <int kVecs, int kCount>
void any_window(const ConvBlockShape& s, const float* x, const Runs& runs, const float* w,
                const float* bias, const Band& band, int64_t begin, int64_t rows, float* conv,
                const Results& to) {
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h, pixel_stride = kVecs * L;
  for (int64_t h = 0; h < band.conv_end - band.conv_begin; ++h)
    conv_row_tiles<kVecs, kCount, AnyTaps>(
        s, x + h * row, runs, w, bias, [&](int64_t cw, const Vec* sum) {
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
        Vec::Bytes code = Vec::bytes((h_begin - h0) * s.pool_w + w_begin - w0);
        for (int64_t h = h_begin; h < h_end; ++h)
          for (int64_t cw = w_begin; cw < w_end; ++cw)
            take_greater(
                Vec::load(conv + ((h - band.conv_begin) * s.conv_w + cw) * pixel_stride + v * L),
                (h - h0) * s.pool_w + cw - w0, best, code);
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
  if (windows_are_2x2(s))
    return with_taps(runs, [&](auto taps) {
      windows_2x2<kVecs, decltype(taps)>(s, x, runs, w, bias, rows, to);
    });
  if constexpr (kVecs <= kMaxRowVecs) {
    if (has_no_pool(s) && runs.count == 3 && runs.length == 3)
      return no_pool<kVecs, kPixels<kVecs>, TapLoops<3, 3>>(s, x, runs, w, bias, rows, to);
    with_row_pixels<kVecs>(s.conv_w, [&](auto count) {
      if (has_no_pool(s))
        no_pool<kVecs, count, AnyTaps>(s, x, runs, w, bias, rows, to);
      else
        any_window<kVecs, count>(s, x, runs, w, bias, band, begin, rows, conv, to);
    });
  }
}

// ----------------------------------------------------------------------------- forward: Winograd

// F(2 × 2, 3 × 3): a 4 × 4 input patch gives a 2 × 2 output tile, which is the pool window if there
// is one, with 16 products per pair of channels where the direct sum has 36. With d the patch and g
// the kernel:
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
// is done again directly. Where a map without a pool ends with half a tile, the other half is
// dropped: what the patch has beyond the image (the next row, or a row of zeros) does not reach the
// half that is kept.

constexpr int kPositions = 16;

// G g along one axis.
[[gnu::always_inline]] inline void winograd_kernel_axis(Vec g0, Vec g1, Vec g2, Vec (&u)[4]) {
  const Vec half = Vec::set(0.5f), outer = (g0 + g2) * half, inner = g1 * half;
  u[0] = g0, u[1] = outer + inner, u[2] = outer - inner, u[3] = g2;
}

// G g Gᵀ [block][position][c][block's channels] of packed forward weights [block][tap][c][...].
inline void winograd_weight(const ConvBlockShape& s, const float* weight, float* u) {
  const ChannelBlocks blocks(s);
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
constexpr int kMinTiles = 12;  // the most of them

// m [tiles, kVecs · L] = v [tiles, C] · u [C, kVecs · L], tiles at least tiles_in_registers: the
// last group overlaps the one before. What follows u is asked for, a line a step: the next
// position's, which for many channels comes from the third-level cache.
template <int kVecs>
void multiply(const float* v, const float* u, int64_t C, int64_t tiles, float* m) {
  constexpr int kTiles = tiles_in_registers(kVecs), kWidth = kVecs * L, kLine = 64 / sizeof(float);
  const float* next = u + C * kWidth;
  for (int64_t at = 0; at < tiles; at += kTiles) {
    const int64_t t = std::min(at, tiles - kTiles);
    Vec sum[kTiles][kVecs];
    for (int i = 0; i < kTiles; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec::zero();
    const float *w = u, *x = v + t * C;
    for (int64_t c = 0; c < C; ++c, w += kWidth, next += kLine) {
      __builtin_prefetch(next, 0, 2);
      Vec weight[kVecs];
      for (int j = 0; j < kVecs; ++j) weight[j] = Vec::load(w + j * L);
      for (int i = 0; i < kTiles; ++i) {
        const Vec value = Vec::set(x[i * C + c]);
        for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec::fma(value, weight[j], sum[i][j]);
      }
    }
    for (int i = 0; i < kTiles; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j].store(m + (t + i) * kWidth + j * L);
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

// How the tiles cover a band: outputs [rows, width] of each of several images, one after the other.
// A window is an output; without a pool a tile is 2 × 2 of them, or what is left at the far edges.
struct TileGrid {
  bool pooled;
  int64_t rows, width;       // of outputs
  int64_t tile_rows, tiles;  // rows of tiles, and tiles in a row

  TileGrid(const ConvBlockShape& s, int64_t rows)
      : pooled(windows_are_2x2(s)),
        rows(rows),
        width(s.out_w),
        tile_rows(pooled ? rows : (rows + 1) / 2),
        tiles(pooled ? s.out_w : (s.out_w + 1) / 2) {}
  int64_t count() const { return tile_rows * tiles; }

  struct Place {
    int64_t image, row, column;  // of the tile in the grid
  };
  Place place(int64_t t) const { return {t / count(), t % count() / tiles, t % tiles}; }
};

// Stores tile t, whose four results are y.
[[gnu::always_inline]] inline void store_tile(const TileGrid& grid, bool relu, int64_t t,
                                              const Vec (&y)[4], const Results& to, int vec) {
  if (grid.pooled) return store_window(relu, y, to, t, vec);
  const auto at = grid.place(t);
  for (int q = 0; q < 4; ++q) {
    const int64_t row = 2 * at.row + q / 2, column = 2 * at.column + q % 2;
    if (row == grid.rows || column == grid.width) continue;
    Vec best = y[q];
    Vec::Bytes code = Vec::bytes(0);
    if (relu) apply_relu(best, code);
    to.store((at.image * grid.rows + row) * grid.width + column, vec, best, code);
  }
}

// One block of channels of tiles [first, first + tiles), whose transformed patches are
// v [position, tile, C]. patch(t) is tile t's patch; w: the block's direct weights, for tiles that
// are not finite.
template <int kVecs, typename Patch>
void winograd_block(const ConvBlockShape& s, const TileGrid& grid, const float* v, int64_t first,
                    int64_t tiles, int64_t padded_tiles, const float* u, const float* w,
                    const float* bias, const Runs& runs, float* m, const Results to,
                    const Patch& patch) {
  const bool relu = s.relu;
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
      conv_tile<kVecs>(patch(first + t), {s.C, row, 0}, runs, w, bias, tile);
      for (int j = 0; j < kVecs; ++j)
        for (int p = 0; p < 4; ++p) y[j][p] = tile.sum[p][j];
    }
    for (int j = 0; j < kVecs; ++j) store_tile(grid, relu, first + t, y[j], to, j);
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
        unpack_pixels(values.data + i * pixels * padded_K, {pixels, 0, padded_K}, out, n + i, p0, 1,
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
  const ChannelBlocks blocks(s);
  const int64_t taps = s.kernel_h * s.kernel_w * s.C, bands = (s.out_h + band - 1) / band;
  Scratch<float> packed, conv;
  Home<T> home(s, out, winner, band * s.out_w);
  // A tile over a row shorter than itself reads past it; those sums are dropped.
  packed.reserve(packed_floats(s, band) + kMaxRowPixels<1> * s.stride_w * s.C);
  if (needs_conv_rows(s))
    conv.reserve(((band - 1) * s.pool_stride_h + s.pool_h) * s.conv_w * kMaxRowVecs * L);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t rows = std::min(band, s.out_h - p0);
    const Band input(s, p0, p0 + rows);
    pack_band(s, x, s.C, n, input.first, input.rows, packed.data);
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
  const ChannelBlocks blocks(s);
  const int64_t taps = 9 * s.C, row = (s.W + 2 * s.pad_w) * s.C;
  const int64_t bands = (s.out_h + band - 1) / band;
  // One row more, which the last tiles of an odd number of rows look at.
  const int64_t packed_size = packed_floats(s, band) + row;
  const int64_t group = images_in_group(s, bands, packed_size, end - begin);
  // Transformed patches of a block of tiles take a quarter of a small second-level cache.
  const int64_t block_tiles = std::max<int64_t>(32768 / (kPositions * s.C), 24) / 24 * 24;
  Scratch<float> packed, v, m;
  Home<T> home(s, out, winner, group * band * s.out_w);
  packed.reserve(group * packed_size);
  std::fill_n(packed.data, group * packed_size, 0.f);
  v.reserve(kPositions * block_tiles * s.C);
  m.reserve(kPositions * block_tiles * kMaxVecs * L);

  for (int64_t unit = begin; unit < end; unit += group) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t images = std::min(group, end - unit), rows = std::min(band, s.out_h - p0);
    const TileGrid grid(s, rows);
    const Band input(s, p0, p0 + rows);
    for (int64_t i = 0; i < images; ++i)
      pack_band(s, x, s.C, n + i, input.first, input.rows, packed.data + i * packed_size);
    const auto patch = [&](int64_t t) {
      const auto at = grid.place(t);
      return packed.data + at.image * packed_size + 2 * at.row * row + 2 * at.column * s.C;
    };
    for (int64_t t0 = 0; t0 < images * grid.count(); t0 += block_tiles) {
      const int64_t tiles = std::min(block_tiles, images * grid.count() - t0);
      const int64_t padded = std::max<int64_t>(tiles, kMinTiles);
      for (int64_t t = 0; t < tiles; ++t)
        winograd_input(patch(t0 + t), row, s.C, v.data + t * s.C, padded * s.C);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t k0 = blocks.begin(b) * L;
        with_vecs(blocks.begin(b + 1) - blocks.begin(b), [&](auto vecs) {
          winograd_block<decltype(vecs)::value>(
              s, grid, v.data, t0, tiles, padded, u + k0 * kPositions * s.C, weight + k0 * taps,
              bias + k0, runs, m.data, home.block(n, p0, k0), patch);
        });
      }
    }
    home.finish(n, p0, images, rows * s.out_w);
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
  std::fill(std::copy_n(bias, s.K, packed_bias.data), packed_bias.data + padded_K, 0.f);
  if (winograd_serves(s)) {
    u.reserve(padded_K * kPositions * s.C);
    winograd_weight(s, packed_weight.data, u.data);
    forward_winograd<T>(s, x, packed_weight.data, u.data, packed_bias.data, out, winner, band,
                        begin, end);
  } else {
    forward_direct<T>(s, x, packed_weight.data, packed_bias.data, out, winner, band, begin, end);
  }
}
