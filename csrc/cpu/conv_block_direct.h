// Direct forward kernels of the conv block over Vec; part of conv_block_kernels.h.

inline bool windows_are_2x2(const ConvBlockShape& s) {
  return s.pool_h == 2 && s.pool_w == 2 && s.pool_stride_h == 2 && s.pool_stride_w == 2 &&
         s.pool_pad_h == 0 && s.pool_pad_w == 0 && 2 * s.out_h <= s.conv_h &&
         2 * s.out_w <= s.conv_w;
}
inline bool has_no_pool(const ConvBlockShape& s) {
  return s.window() == 1 && s.out_h == s.conv_h && s.out_w == s.conv_w;
}
// Does Winograd's algorithm pay? There are at least 16 input channels to spread the transforms
// over, in whole vectors, and its 16 products of floats are fewer than 36 / 2 of pairs, without
// their transforms, would be.
inline bool winograd_serves(const ConvBlockShape& s) {
  return !kNarrow && s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && (windows_are_2x2(s) || has_no_pool(s)) &&
         s.C % L == 0 && s.C >= 16 && s.K >= 16;
}

inline bool needs_conv_rows(const ConvBlockShape& s) {
  return !windows_are_2x2(s) && !has_no_pool(s);
}

// Register tiles: conv-map positions × kVecs vectors of output channels. AVX2 has 16 registers:
// 4 · 3 sums + 3 weights + 1 broadcast = 16. AVX-512 has 32: 12 · 2 + 2 + 1 = 27. A sum of floats
// is ready for its next addition after 4 cycles, in which 8 can be made; one of pairs after 6, in
// which 12 can. A large kernel's weights come from the second-level cache for every tile: the more
// positions it has, the fewer bytes there are to a multiply-add. A row takes what fills it.
constexpr int kMaxVecs = L == 16 ? 2 : 3;
template <int kVecs>
constexpr int kMaxPixels = L == 16      ? (kVecs == 1 ? 16 : 12)
                           : kVecs == 1 ? 8
                                        : 4;
constexpr int kMinPixels = 4;

// Where the taps are unrolled, or Winograd's algorithm gives way to the direct sum.
template <int kVecs>
constexpr int kPixels = kVecs == 1 ? 8 : 4;
constexpr int kWinogradVecs = L == 16 ? 4 : 3;

// Blocks of output channels, as equal as possible.
struct ChannelBlocks {
  int64_t K, vecs, count;
  explicit ChannelBlocks(const ConvBlockShape& s) : K(s.K), vecs((s.K + L - 1) / L) {
    const int64_t most = winograd_serves(s) ? kWinogradVecs : kMaxVecs;
    count = (vecs + most - 1) / most;
  }
  int64_t begin(int64_t b) const { return b * (vecs / count) + std::min(b, vecs % count); }
  int64_t channel(int64_t b) const { return std::min(begin(b) * L, K); }  // begin, or the end
};

// [run, position in the run][channels]: the order in which a tile reads the weights of the block of
// `width` channels from k0 on.
inline void pack_block(const ConvBlockShape& s, const DenseWeight& weight, int64_t k0,
                       int64_t width, float* packed) {
  const int64_t taps = s.kernel_h * s.kernel_w, row = taps * s.C;
  const int64_t channels = std::min(width, s.K - k0);
  if (channels < width) std::fill_n(packed, row * width, 0.f);
  const Pixels by_tap{row, 0, width}, by_channel{taps, width, s.C * width};
  channels_to_pixels(weight.data + k0 * row, row, channels, row, packed,
                     weight.channel == 1 ? by_tap : by_channel);
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

// Elements of weights for one vector of channels: E's pairs fill up an odd run.
template <typename E>
int64_t weights_of_vec(const Runs& runs) {
  return runs.count * round_up(runs.length, kPerLane<E>) * L;
}

template <int kVecs, typename Taps = AnyTaps, int kCount = kPixels<kVecs>, typename E>
[[gnu::always_inline]] inline void conv_tile(const E* x, const Positions& at, const Runs& runs,
                                             const E* w, const float* bias,
                                             Tile<kVecs, kCount>& tile) {
  const int64_t run_count = Taps::runs ? Taps::runs : runs.count;
  const int64_t run_length = Taps::length ? Taps::length : runs.length;
  Vec sum[kCount][kVecs];
  for (int v = 0; v < kVecs; ++v)
    for (int p = 0; p < kCount; ++p) sum[p][v] = Vec::load(bias + v * L);
#pragma GCC unroll 3
  for (int64_t r = 0; r < run_count; ++r) {
    const E* x0 = x + runs.offset[r];
    const E* x2 = x0 + at.pair;
    const E* const four[4] = {x0, x0 + at.step, x2, x2 + at.step};
    const auto add = [&](const auto& value_at, int64_t e) __attribute__((always_inline)) {
      decltype(load_lanes(w)) weight[kVecs];
      for (int v = 0; v < kVecs; ++v) weight[v] = load_lanes(w + v * L * kPerLane<E>);
#pragma GCC unroll 16
      for (int p = 0; p < kCount; ++p) {
        const auto value = value_at(four[p % 4] + e + p / 4 * at.four);
        for (int v = 0; v < kVecs; ++v) add_product(value, weight[v], sum[p][v]);
      }
      if constexpr (Taps::length > 0)
        for (int p = 0; p < kCount; ++p)
          for (int v = 0; v < kVecs; ++v) keep_in_step(sum[p][v]);
      w += kVecs * L * kPerLane<E>;
    };
    int64_t e = 0;
#pragma GCC unroll 11
    for (; e + kPerLane<E> <= run_length; e += kPerLane<E>)
      add([](const E* p) __attribute__((always_inline)) { return factor_of(p); }, e);
    if (e < run_length)
      add([](const E* p) __attribute__((always_inline)) { return last_factor(p); }, e);
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
  return s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1;
}

// Does conv_patch serve all blocks of channels? It multiplies floats.
inline bool weights_stay(const ConvBlockShape& s) {
  const ChannelBlocks blocks(s);
  const int64_t vecs = (blocks.vecs + blocks.count - 1) / blocks.count;
  return L == 16 && windows_are_2x2(s) && has_plain_taps(s) && s.kernel_h == 3 && s.kernel_w == 3 &&
         (s.C == 1 || s.C == 3) && 9 * s.C * vecs <= 27;
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

// Where the results of a band go, [pixel, channel]: straight into out and winner where their rows
// are whole vectors of float, else into scratch. Kernels take it by value, or every byte of a
// winner that is stored might have changed it.
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

// Calls f(first window, integral_constant of their number) for tiles of at most kMost windows, as
// few as can be and as equal as possible.
template <int kMost, typename F>
[[gnu::always_inline]] inline void for_window_tiles(int64_t windows, const F& f) {
  const int64_t tiles = (windows + kMost - 1) / kMost;
  for (int64_t i = 0, first = 0; i < tiles; ++i) {
    const int64_t count = windows / tiles + (i < windows % tiles);
    if (count == 1) f(first, std::integral_constant<int, 1>{});
    if constexpr (kMost > 1)
      if (count == 2) f(first, std::integral_constant<int, 2>{});
    if constexpr (kMost > 2)
      if (count == 3) f(first, std::integral_constant<int, 3>{});
    if constexpr (kMost > 3)
      if (count == 4) f(first, std::integral_constant<int, 4>{});
    first += count;
  }
}

// Pool and ReLU for one block of channels, given the band's packed input.
template <int kVecs, typename Taps, typename E>
void windows_2x2(const ConvBlockShape& s, const E* x, const Runs& runs, const E* w,
                 const float* bias, int64_t rows, const Results to) {
  const bool relu = s.relu;
  const int64_t out_w = s.out_w;
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h, step = s.stride_w * s.C;
  // The first `wanted` of a tile's windows, from pooled pixel `pixel` on.
  const auto store = [&](auto windows, auto wanted, int64_t pixel, const auto& tile, auto place) {
#pragma GCC unroll 4
    for (int i = 0; i < windows; ++i)
      if (i < wanted)
        for (int v = 0; v < kVecs; ++v) {
          const Vec y[4] = {tile.sum[place(i, 0)][v], tile.sum[place(i, 1)][v],
                            tile.sum[place(i, 2)][v], tile.sum[place(i, 3)][v]};
          store_window(relu, y, to, pixel + i, v);
        }
  };
  if constexpr (kWeightsStay<kVecs, Taps> && std::is_same_v<E, float>)
    if (has_plain_taps(s)) {
      constexpr int kWindows = kPixels<kVecs> / 4, kCols = 2 * kWindows;
      const Weights<kVecs, Taps> weights(w);
      for (int64_t ph = 0; ph < rows; ++ph)
        for (int64_t pw = 0; pw < out_w; pw += kWindows) {
          const int64_t first = tile_begin(pw, kWindows, out_w);
          Tile<kVecs> tile;
          conv_patch<kVecs, Taps>(x + 2 * ph * row + 2 * first * step, row, weights, bias, tile);
          store(std::integral_constant<int, kWindows>{}, out_w - first, ph * out_w + first, tile,
                [](int i, int q) { return q / 2 * kCols + 2 * i + q % 2; });
        }
      return;
    }
  for (int64_t ph = 0; ph < rows; ++ph)
    for_window_tiles<kMaxPixels<kVecs> / 4>(
        out_w, [&](int64_t first, auto windows) __attribute__((always_inline)) {
          Tile<kVecs, 4 * windows> tile;
          conv_tile<kVecs, Taps, 4 * windows>(x + 2 * ph * row + 2 * first * step,
                                              {step, row, 2 * step}, runs, w, bias, tile);
          store(windows, windows, ph * out_w + first, tile, [](int i, int q) { return 4 * i + q; });
        });
}

// Calls f(integral_constant of the positions in a tile): as few tiles to a row of the conv map as
// can be, all as wide as they must be.
template <int kVecs, int kCount = kMaxPixels<kVecs>, typename F>
void with_row_pixels(int64_t conv_w, const F& f) {
  constexpr int64_t kMost = kMaxPixels<kVecs>;
  const int64_t tiles = (conv_w + kMost - 1) / kMost;
  if constexpr (kCount > kMinPixels)
    if ((kCount - 1) * tiles >= conv_w) return with_row_pixels<kVecs, kCount - 1>(conv_w, f);
  f(std::integral_constant<int, kCount>{});
}

// epilogue(place in the row, sums) for one row of the conv map.
template <int kVecs, int kCount, typename Taps, typename E, typename Epilogue>
[[gnu::always_inline]] inline void conv_row_tiles(const ConvBlockShape& s, const E* x,
                                                  const Runs& runs, const E* w, const float* bias,
                                                  const Epilogue& epilogue) {
  const int64_t step = s.stride_w * s.C, pixels = std::min<int64_t>(kCount, s.conv_w);
  for (int64_t cw = 0; cw < s.conv_w; cw += kCount) {
    const int64_t first = tile_begin(cw, kCount, s.conv_w);
    Tile<kVecs, kCount> tile;
    conv_tile<kVecs, Taps, kCount>(x + first * step, {step, 2 * step, 4 * step}, runs, w, bias,
                                   tile);
    for (int64_t p = 0; p < pixels; ++p) epilogue(first + p, tile.sum[p]);
  }
}

template <int kVecs, int kCount, typename Taps, typename E>
void no_pool(const ConvBlockShape& s, const E* x, const Runs& runs, const E* w, const float* bias,
             int64_t rows, const Results to) {
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

// Part of the conv map: rows of neighbouring positions, distances in floats.
struct MapPart {
  const float* first;
  int64_t rows, columns, row_stride, stride;
};

// The maximum of a window whose place nobody wants, in half the steps.
[[gnu::always_inline]] inline Vec maximum(const MapPart& window) {
  Vec best = Vec::load(window.first);
  Vec::Mask nan = Vec::is_nan(best);
  for (int64_t h = 0; h < window.rows; ++h)
    for (int64_t w = 0; w < window.columns; ++w) {
      const Vec value = Vec::load(window.first + h * window.row_stride + w * window.stride);
      nan = Vec::either(nan, Vec::is_nan(value));
      best = Vec::max(best, value);
    }
  return Vec::select(nan, Vec::set(std::numeric_limits<float>::quiet_NaN()), best);
}

// Any window: the block's conv rows of the band go through `conv`, then the windows over it.
template <int kVecs, int kCount, typename E>
void any_window(const ConvBlockShape& s, const E* x, const Runs& runs, const E* w,
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
        const MapPart window{
            conv + ((h_begin - band.conv_begin) * s.conv_w + w_begin) * pixel_stride + v * L,
            h_end - h_begin, w_end - w_begin, s.conv_w * pixel_stride, pixel_stride};
        if (!to.code)
          best = maximum(window);
        else
          for (int64_t h = h_begin; h < h_end; ++h)
            for (int64_t cw = w_begin; cw < w_end; ++cw)
              take_greater(Vec::load(window.first + (h - h_begin) * window.row_stride +
                                     (cw - w_begin) * pixel_stride),
                           (h - h0) * s.pool_w + cw - w0, best, code);
        if (s.relu) apply_relu(best, code);
        const int64_t pixel = r * s.out_w + pw;
        to.store(pixel, v, best, code);
      }
    }
}

template <int kVecs, typename E>
void forward_block(const ConvBlockShape& s, const E* x, const Runs& runs, const E* w,
                   const float* bias, const Band& band, int64_t begin, int64_t rows, float* conv,
                   const Results& to) {
  if (windows_are_2x2(s))
    return with_taps(runs, [&](auto taps) {
      windows_2x2<kVecs, decltype(taps)>(s, x, runs, w, bias, rows, to);
    });
  if (has_no_pool(s) && runs.count == 3 && runs.length == 3)
    return no_pool<kVecs, kPixels<kVecs>, TapLoops<3, 3>>(s, x, runs, w, bias, rows, to);
  with_row_pixels<kVecs>(s.conv_w, [&](auto count) {
    if (has_no_pool(s))
      no_pool<kVecs, count, AnyTaps>(s, x, runs, w, bias, rows, to);
    else
      any_window<kVecs, count>(s, x, runs, w, bias, band, begin, rows, conv, to);
  });
}
