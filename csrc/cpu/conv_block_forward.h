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

  // Channels [k0, k1) of `pixels` of each of `images`; out is dense, so that they are one long row.
  void finish(int64_t n, int64_t p0, int64_t images, int64_t pixels, int64_t k0, int64_t k1) const {
    if (!direct)
      for (int64_t i = 0; i < images; ++i)
        unpack_pixels(values.data + i * pixels * padded_K + k0, {pixels, 0, padded_K},
                      out.from_channel(k0), n + i, p0, 1, k1 - k0);
    if (winner && !whole_vectors)
      for (int64_t p = 0; p < images * pixels; ++p)
        std::copy_n(codes.data + p * padded_K + k0, k1 - k0, winner_row(n, p0) + p * s.K + k0);
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

static_assert(kBiasPadding >= L - 1);

// What a thread does in one go: bands [begin, end), and blocks [first_block, last_block) of the
// channels of each.
struct Job {
  int64_t begin, end, first_block, last_block;
};

// Calls f(job) for the units [begin, end): whole bands together.
template <typename F>
void for_jobs(int64_t begin, int64_t end, int64_t shares, int64_t blocks, const F& f) {
  while (begin < end) {
    const int64_t band = begin / shares, share = begin % shares;
    const int64_t whole = share ? 0 : end / shares - band;
    if (whole > 0) {
      f(Job{band, band + whole, 0, blocks});
      begin += whole * shares;
    } else {
      const int64_t last = std::min(end - band * shares, shares);
      f(Job{band, band + 1, share * blocks / shares, last * blocks / shares});
      begin = band * shares + last;
    }
  }
}

template <typename T, typename E>
void forward_direct(const ConvBlockShape& s, const View4<const T>& x, const E* weight,
                    const float* bias, const View4<T>& out, uint8_t* winner,
                    const ForwardUnits& units, const Job& job) {
  const Runs runs(s);
  const ChannelBlocks blocks(s);
  const int64_t band = units.rows, bands = units.bands;
  const bool whole_images = bands == 1 && s.C > 1;
  Scratch<E> packed;
  Scratch<float> conv;
  Home<T> home(s, out, winner, band * s.out_w);
  // A tile over a row shorter than itself reads past it; those sums are dropped.
  packed.reserve(packed_floats(s, band) + kMaxPixels<1> * s.stride_w * s.C);
  if (needs_conv_rows(s))
    conv.reserve(((band - 1) * s.pool_stride_h + s.pool_h) * s.conv_w * kMaxVecs * L);

  for (int64_t unit = job.begin; unit < job.end; ++unit) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t rows = std::min(band, s.out_h - p0);
    const Band input(s, p0, p0 + rows);
    pack_band(s, x, s.C, n, input.first, input.rows, packed.data);
    if (whole_images && unit + 1 < job.end) ask_for_image(s, x, n + 1);
    for (int64_t b = job.first_block; b < job.last_block; ++b) {
      const int64_t k0 = blocks.begin(b) * L;
      const E* w = weight + blocks.begin(b) * weights_of_vec<E>(runs);
      with_vecs<kMaxVecs>(blocks.begin(b + 1) - blocks.begin(b), [&](auto vecs) {
        forward_block<decltype(vecs)::value>(s, packed.data, runs, w, bias + k0, input, p0, rows,
                                             conv.data, home.block(n, p0, k0));
      });
    }
    home.finish(n, p0, 1, rows * s.out_w, blocks.channel(job.first_block),
                blocks.channel(job.last_block));
  }
}

template <typename T>
void forward_winograd(const ConvBlockShape& s, const View4<const T>& x, const float* weight,
                      const float* u, const float* bias, const View4<T>& out, uint8_t* winner,
                      const ForwardUnits& units, const Job& job) {
  const Runs runs(s);
  const ChannelBlocks blocks(s);
  const int64_t taps = 9 * s.C, row = (s.W + 2 * s.pad_w) * s.C;
  const int64_t band = units.rows, bands = units.bands;
  // One row more, which the last tiles of an odd number of rows look at, and one pixel, which the
  // very last tile does if the width is odd too.
  const int64_t beyond = row + s.C, packed_size = packed_floats(s, band) + beyond;
  const int64_t group = images_in_group(s, bands, packed_size, job.end - job.begin);
  // Transformed patches of a block of tiles take a quarter of a small second-level cache.
  const int64_t block_tiles = std::max<int64_t>(32768 / (kPositions * s.C), 24) / 24 * 24;
  Scratch<float> packed, v, m;
  Home<T> home(s, out, winner, group * band * s.out_w);
  packed.reserve(group * packed_size);
  v.reserve(kPositions * block_tiles * s.C);
  m.reserve(kPositions * block_tiles * kWinogradVecs * L);

  for (int64_t unit = job.begin; unit < job.end; unit += group) {
    const int64_t n = unit / bands, p0 = unit % bands * band;
    const int64_t images = std::min(group, job.end - unit), rows = std::min(band, s.out_h - p0);
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
      for (int64_t b = job.first_block; b < job.last_block; ++b) {
        const int64_t k0 = blocks.begin(b) * L;
        with_vecs<kWinogradVecs>(blocks.begin(b + 1) - blocks.begin(b), [&](auto vecs) {
          winograd_block<decltype(vecs)::value>(
              s, grid, v.data, t0, tiles, padded, u + k0 * kPositions * s.C, weight + k0 * taps,
              bias + k0, runs, m.data, home.block(n, p0, k0), patch);
        });
      }
    }
    home.finish(n, p0, images, rows * s.out_w, blocks.channel(job.first_block),
                blocks.channel(job.last_block));
  }
}

// ---- weights

enum class ForwardPath { kColumns, kWinograd, kPairs, kDirect };
inline ForwardPath forward_path(const ConvBlockShape& s) {
  if (winograd_serves(s)) return ForwardPath::kWinograd;
  if (columns_serve(s)) return ForwardPath::kColumns;
  return kNarrow && !weights_stay(s) ? ForwardPath::kPairs : ForwardPath::kDirect;
}

inline int64_t packed_weight_blocks(const ConvBlockShape& s) {
  return forward_path(s) == ForwardPath::kColumns ? 1 : ChannelBlocks(s).count;
}

// Floats of the blocks of direct weights, which Winograd's follow.
inline int64_t direct_floats(const ConvBlockShape& s) {
  return round_up(s.K, L) * s.kernel_h * s.kernel_w * s.C;
}
inline int64_t packed_weight_floats(const ConvBlockShape& s) {
  switch (forward_path(s)) {
    case ForwardPath::kColumns:
      return s.K * s.kernel_h * s.kernel_w * s.C;
    case ForwardPath::kWinograd:
      return direct_floats(s) + round_up(s.K, L) * kPositions * s.C;
    case ForwardPath::kPairs:
      return (s.K + L - 1) / L * weights_of_vec<Operand>(Runs(s)) / kPerLane<Operand>;
    default:
      return direct_floats(s);
  }
}

// A block's packed weights as pairs of neighbours of a run; an odd run ends with a zero.
inline void pack_pairs(const Runs& runs, const float* packed, int64_t width, Operand* to) {
  for (int64_t r = 0; r < runs.count; ++r, packed += runs.length * width)
    for (int64_t e = 0; e < runs.length; e += 2)
      for (int64_t k = 0; k < width; ++k)
        for (int64_t i = 0; i < 2; ++i)
          *to++ = static_cast<Operand>(e + i < runs.length ? packed[(e + i) * width + k] : 0.f);
}

inline void pack_weight(const ConvBlockShape& s, const DenseWeight& weight, int64_t block,
                        float* packed) {
  const ForwardPath path = forward_path(s);
  if (path == ForwardPath::kColumns) return pack_by_part(s, weight, packed);
  const ChannelBlocks blocks(s);
  const int64_t k0 = blocks.begin(block) * L, width = blocks.begin(block + 1) * L - k0;
  const int64_t row = s.kernel_h * s.kernel_w * s.C;
  if (path == ForwardPath::kPairs) {
    const Runs runs(s);
    Scratch<float> wide;
    wide.reserve(row * width);
    pack_block(s, weight, k0, width, wide.data);
    Operand* pairs = reinterpret_cast<Operand*>(packed);
    return pack_pairs(runs, wide.data, width,
                      pairs + blocks.begin(block) * weights_of_vec<Operand>(runs));
  }
  pack_block(s, weight, k0, width, packed + k0 * row);
  if (path == ForwardPath::kWinograd)
    winograd_weight(s.C * width, packed + k0 * row,
                    packed + direct_floats(s) + k0 * kPositions * s.C);
}

template <typename T>
void forward(const ConvBlockShape& s, const View4<const T>& x, const float* packed,
             const float* bias, const View4<T>& out, uint8_t* winner, const ForwardUnits& units,
             int64_t begin, int64_t end) {
  const ForwardPath path = forward_path(s);
  if (path == ForwardPath::kColumns)
    return forward_columns<T>(s, x, packed, bias, out, winner, units, begin, end);
  for_jobs(begin, end, units.shares, packed_weight_blocks(s), [&](const Job& job) {
    if (path == ForwardPath::kWinograd)
      forward_winograd<T>(s, x, packed, packed + direct_floats(s), bias, out, winner, units, job);
    else if (path == ForwardPath::kPairs)
      forward_direct<T>(s, x, reinterpret_cast<const Operand*>(packed), bias, out, winner, units,
                        job);
    else
      forward_direct<T>(s, x, packed, bias, out, winner, units, job);
  });
}
