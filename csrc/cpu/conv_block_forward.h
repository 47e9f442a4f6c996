// Forward pass of the conv block over Vec: bands of images go through the direct kernels or
// Winograd's. Part of conv_block_kernels.h.

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

// f(integral_constant of `vecs`), of which there are at most kMost.
template <int kMost, typename F>
void with_vecs(int64_t vecs, const F& f) {
  if (vecs == kMost) return f(std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) with_vecs<kMost - 1>(vecs, f);
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

// Asks for image n, as far as it is dense, while the one before it is worked on: the processor's
// own prefetching would begin anew with each small image. (Those of one channel follow too fast.)
template <typename T>
void ask_for_image(const ConvBlockShape& s, const View4<const T>& x, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const T* image = x.at(n, 0, 0, 0);
  for (int64_t i = 0; i < s.C * s.H * s.W; i += kLine) __builtin_prefetch(image + i, 0, 2);
}

template <typename T, typename E>
void forward_direct(const ConvBlockShape& s, const View4<const T>& x, const E* weight,
                    const float* bias, const View4<T>& out, uint8_t* winner, int64_t band,
                    int64_t begin, int64_t end) {
  const Runs runs(s);
  const ChannelBlocks blocks(s);
  const int64_t bands = (s.out_h + band - 1) / band;
  const bool whole_images = bands == 1 && s.C > 1;
  Scratch<E> packed;
  Scratch<float> conv;
  Home<T> home(s, out, winner, band * s.out_w);
  // A tile over a row shorter than itself reads past it; those sums are dropped.
  packed.reserve(packed_floats(s, band) + kMaxPixels<1> * s.stride_w * s.C);
  if (needs_conv_rows(s))
    conv.reserve(((band - 1) * s.pool_stride_h + s.pool_h) * s.conv_w * kMaxVecs * L);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t rows = std::min(band, s.out_h - p0);
    const Band input(s, p0, p0 + rows);
    pack_band(s, x, s.C, n, input.first, input.rows, packed.data);
    if (whole_images && unit + 1 < end) ask_for_image(s, x, n + 1);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t k0 = blocks.begin(b) * L;
      const E* w = weight + blocks.begin(b) * weights_of_vec<E>(runs);
      with_vecs<kMaxVecs>(blocks.begin(b + 1) - blocks.begin(b), [&](auto vecs) {
        forward_block<decltype(vecs)::value>(s, packed.data, runs, w, bias + k0, input, p0, rows,
                                             conv.data, home.block(n, p0, k0));
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
  // One row more, which the last tiles of an odd number of rows look at, and one pixel, which the
  // very last tile does if the width is odd too.
  const int64_t beyond = row + s.C, packed_size = packed_floats(s, band) + beyond;
  const int64_t group = images_in_group(s, bands, packed_size, end - begin);
  // Transformed patches of a block of tiles take a quarter of a small second-level cache.
  const int64_t block_tiles = std::max<int64_t>(32768 / (kPositions * s.C), 24) / 24 * 24;
  Scratch<float> packed, v, m;
  Home<T> home(s, out, winner, group * band * s.out_w);
  packed.reserve(group * packed_size);
  v.reserve(kPositions * block_tiles * s.C);
  m.reserve(kPositions * block_tiles * kWinogradVecs * L);

  for (int64_t unit = begin; unit < end; unit += group) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t images = std::min(group, end - unit), rows = std::min(band, s.out_h - p0);
    const TileGrid grid(s, rows);
    const Band input(s, p0, p0 + rows);
    for (int64_t i = 0; i < images; ++i) {
      float* image = packed.data + i * packed_size;
      pack_band(s, x, s.C, n + i, input.first, input.rows, image);
      std::fill_n(image + input.rows * row, beyond, 0.f);
    }
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
        with_vecs<kWinogradVecs>(blocks.begin(b + 1) - blocks.begin(b), [&](auto vecs) {
          winograd_block<decltype(vecs)::value>(
              s, grid, v.data, t0, tiles, padded, u + k0 * kPositions * s.C, weight + k0 * taps,
              bias + k0, runs, m.data, home.block(n, p0, k0), patch);
        });
      }
    }
    home.finish(n, p0, images, rows * s.out_w);
  }
}

// Packed forward weights as pairs of neighbours of a run; an odd run ends with a zero.
inline void pack_pairs(const ConvBlockShape& s, const float* packed, Operand* to) {
  const Runs runs(s);
  const ChannelBlocks blocks(s);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t width = (blocks.begin(b + 1) - blocks.begin(b)) * L;
    for (int64_t r = 0; r < runs.count; ++r, packed += runs.length * width)
      for (int64_t e = 0; e < runs.length; e += 2)
        for (int64_t k = 0; k < width; ++k)
          for (int64_t i = 0; i < 2; ++i)
            *to++ = static_cast<Operand>(e + i < runs.length ? packed[(e + i) * width + k] : 0.f);
  }
}

template <typename T>
void forward(const ConvBlockShape& s, const View4<const T>& x, const float* weight,
             const float* bias, const View4<T>& out, uint8_t* winner, int64_t band, int64_t begin,
             int64_t end) {
  if (columns_serve(s) && !winograd_serves(s))
    return forward_columns<T>(s, x, weight, bias, out, winner, band, begin, end);
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
  } else if (kNarrow && !weights_stay(s)) {
    Scratch<Operand> pairs;
    pairs.reserve(padded_K / L * weights_of_vec<Operand>(Runs(s)));
    pack_pairs(s, packed_weight.data, pairs.data);
    forward_direct<T>(s, x, pairs.data, packed_bias.data, out, winner, band, begin, end);
  } else {
    forward_direct<T>(s, x, packed_weight.data, packed_bias.data, out, winner, band, begin, end);
  }
}
