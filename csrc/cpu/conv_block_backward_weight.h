// Gradient of the conv block's weight and bias over Vec; part of conv_block_kernels.h.

// The gradient of a group of bands by channel: g [K, stride] with zero where the ReLU is shut, and
// `at`, the packed offset of each winner's first tap.
struct ChannelMajor {
  Scratch<float> g, code, base;
  Scratch<Operand> narrowed;
  Scratch<int32_t> at;
  int64_t stride = 0;
  float places[16];  // offset of each place of a window

  void reserve(const ConvBlockShape& s, int64_t channels, int64_t pixels) {
    for (int64_t q = 0; q < s.window(); ++q) places[q] = float(place_offset(s, q));
    stride = round_up(pixels, L);
    g.reserve(channels * stride), code.reserve(channels * stride), at.reserve(channels * stride);
    base.reserve(stride);
    if (kNarrow) narrowed.reserve(channels * stride);
  }

  Operand* factors() const { return operands_of(g.data, narrowed.data); }

  // Pooled rows [p0, p1) × columns [w0, w1) of image n as columns from `column` on. Their packed
  // rows begin at `packed` and are those from `first` on.
  template <typename T>
  void fill(const ConvBlockShape& s, const View4<const T>& grad, const uint8_t* winner, int64_t n,
            int64_t p0, int64_t p1, int64_t w0, int64_t w1, int64_t first, int64_t column,
            int64_t packed) {
    const int64_t width = w1 - w0, pixels = (p1 - p0) * width;
    float* at_place_0 = base.data + column;
    for (int64_t ph = p0; ph < p1; ++ph)
      for (int64_t pw = w0; pw < w1; ++pw)
        *at_place_0++ = float(packed + window_offset(s, ph, pw, first));
    if (winner)
      pixels_to_channels(winner + ((n * s.out_h + p0) * s.out_w + w0) * s.K,
                         {width, s.out_w * s.K, s.K}, s.K, pixels, code.data + column, stride);
    const T* src = grad.at(n, 0, p0, w0);
    float* dst = g.data + column;
    if (grad.c == 1)
      return pixels_to_channels(src, {width, grad.h, grad.w}, s.K, pixels, dst, stride);
    const bool one_run = grad.w == 1 && grad.h == width;
    for (int64_t k = 0; k < s.K; ++k)
      for (int64_t r = 0; r < (one_run ? 1 : p1 - p0); ++r) {
        const T* row = src + k * grad.c + r * grad.h;
        float* to = dst + k * stride + r * width;
        if (grad.w == 1)
          copy_row(row, one_run ? pixels : width, to);
        else
          for (int64_t w = 0; w < width; ++w) to[w] = static_cast<float>(row[w * grad.w]);
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
        const Vec::Mask shut = Vec::equal(c, Vec::set(float(kShutCode)));
        value = Vec::select(shut, Vec::zero(), value);
        Vec place = Vec::zero();
        for (int64_t q = 1; q < s.window(); ++q)
          place = Vec::select(Vec::equal(c, Vec::set(float(q))), Vec::set(places[q]), place);
        // Place 0 of a window may lie outside the map: a shut winner points at the very beginning.
        offset = Vec::select(shut, Vec::zero(), offset + place);
      }
      store_operands(value, factors() + k * stride + p);
      offset.store(at.data + k * stride + p);
      sum = sum + value;
    }
    return sum_of_lanes(sum);
  }
};

// Where channels fill no whole vectors, the taps of every position of the conv map are copied next
// to each other: a *patch*, padded to whole vectors. The kernel over the image is then one of 1 × 1
// over patches, and what every output channel reads is aligned: a load that crosses a cache line
// takes twice as long.
inline ConvBlockShape patch_shape(const ConvBlockShape& s) {
  ConvBlockShape patches = s;
  patches.C = round_up(s.kernel_h * s.kernel_w * s.C, L);
  patches.H = s.conv_h, patches.W = s.conv_w;
  patches.kernel_h = patches.kernel_w = patches.stride_h = patches.stride_w = 1;
  patches.dilation_h = patches.dilation_w = 1;
  patches.pad_h = patches.pad_w = 0;
  return patches;
}

// Cycles per output channel and pooled output of the sums over positions, from 2 loads a cycle, one
// of which is the gradient's. Without patches two for each vector, which crosses a line. With them
// 3 for each vector that is copied to a patch, and the sums of a channel are loaded and stored for
// each tile of outputs whose patches fit the cache.
struct PositionCycles {
  double plain, patches;

  explicit PositionCycles(const ConvBlockShape& s) {
    const Runs runs(s);
    const ConvBlockShape by_patch = patch_shape(s);
    const double copied = double(runs.count * ((runs.length + L - 1) / L)),
                 vecs = double(by_patch.C) / L;
    const double positions = double(s.conv_h * s.conv_w) / double(s.K * s.out_h * s.out_w);
    const OutputTile tile(by_patch);
    const double per_tile = (20 + 1.5 * vecs) / double(tile.rows * tile.columns);
    plain = (s.C % L == 0 ? copied / 2 : copied) + 1;
    patches = vecs / 2 + 1 + per_tile + 3 * copied * positions;
  }
};

// Patches under a row of windows beyond this fit no cache; from 2^24 elements on, floats would not
// hold their offsets either.
constexpr int64_t kMostPatchElements = 1 << 20;

inline bool patches_pay(const ConvBlockShape& s) {
  const PositionCycles cycles(s);
  const int64_t of_windows = s.pool_h * s.conv_w * patch_shape(s).C;
  return s.C % L != 0 && of_windows <= kMostPatchElements && cycles.patches < cycles.plain;
}

// By columns 2 multiply-adds a cycle go over the whole map, and its gradient takes another 2
// cycles.
inline bool columns_are_cheaper(const ConvBlockShape& s) {
  if (!columns_serve(s)) return false;
  const double positions = 2 * double(map_columns(s)) / double(s.out_w);
  const double columns = double(s.kernel_h * s.kernel_w * s.C) * positions / (2 * L) + 2;
  const PositionCycles cycles(s);
  return columns < (patches_pay(s) ? cycles.patches : cycles.plain);
}

// What a patch has of one run of the image.
struct Piece {
  int64_t from, to, length;
};

inline void copy_lanes(const Operand* from, Operand* to) {
  std::memcpy(to, from, L * sizeof(Operand));
}

// Row [positions, width] of patches; kPieces is their number where every one fits a vector, else 0.
template <int kPieces>
void pack_patch_row(const std::vector<Piece>& pieces, const Operand* src, int64_t step,
                    int64_t positions, Operand* dst, int64_t width) {
  for (int64_t w = 0; w < positions; ++w, src += step, dst += width)
    if constexpr (kPieces > 0) {
      const Piece* piece = pieces.data();
#pragma GCC unroll 5
      for (int i = 0; i < kPieces; ++i) copy_lanes(src + piece[i].from, dst + piece[i].to);
    } else {
      for (const Piece& piece : pieces)
        for (int64_t e = 0; e < piece.length; e += L)
          copy_lanes(src + piece.from + e, dst + piece.to + e);
    }
}

// Elements [first, first + width) of the patches of conv rows [begin, end), [position, width], from
// the packed image, whose rows are those under `begin` on. Ascending: what a copy writes past a run
// is written again, or means nothing. What pads a patch is left as it is: it must not be what was
// in memory before, where it might be denormal, at which a multiply-add takes a hundred cycles.
inline void pack_patches(const ConvBlockShape& s, const Runs& runs, const Operand* image,
                         int64_t begin, int64_t end, int64_t first, int64_t width, Operand* dst) {
  std::vector<Piece> pieces;
  bool short_ones = true;
  for (int64_t r = 0; r < runs.count; ++r) {
    const int64_t e0 = std::max(r * runs.length, first);
    const int64_t e1 = std::min((r + 1) * runs.length, first + width);
    if (e0 < e1) pieces.push_back({runs.offset[r] + e0 - r * runs.length, e0 - first, e1 - e0});
    short_ones = short_ones && e1 - e0 <= L;
  }
  const auto pack = !short_ones          ? pack_patch_row<0>
                    : pieces.size() == 3 ? pack_patch_row<3>
                    : pieces.size() == 5 ? pack_patch_row<5>
                                         : pack_patch_row<0>;
  const int64_t row = (s.W + 2 * s.pad_w) * s.C * s.stride_h, step = s.stride_w * s.C;
  for (int64_t h = 0; h < end - begin; ++h)
    pack(pieces, image + h * row, step, s.conv_w, dst + h * s.conv_w * width, width);
}

// The input as the sums over positions read it: packed pixels, or patches.
template <typename T>
struct PositionInput {
  const ConvBlockShape& image;
  const bool patches;
  const ConvBlockShape shape;  // what the sums work on
  const int64_t elements;      // in a row of dW
  const Runs runs;             // of the image
  Scratch<Operand> packed;

  explicit PositionInput(const ConvBlockShape& s)
      : image(s),
        patches(patches_pay(s)),
        shape(patches ? patch_shape(s) : s),
        elements(s.kernel_h * s.kernel_w * s.C),
        runs(s) {}

  void reserve(int64_t rows) {
    if (patches) packed.reserve(packed_floats(image, rows));
  }

  // Channels [first, first + group.C) under pooled rows [p0, p1) of image n; `channels` of them are
  // there.
  void pack(const ConvBlockShape& group, const View4<const T>& x, int64_t n, int64_t p0, int64_t p1,
            int64_t first, int64_t channels, Operand* dst) const {
    const Band rows(image, p0, p1);
    if (!patches)
      return pack_band(group, x.from_channel(first), channels, n, rows.first, rows.rows, dst);
    pack_band(image, x, image.C, n, rows.first, rows.rows, packed.data);
    pack_patches(image, runs, packed.data, rows.conv_begin, rows.conv_end, first, group.C, dst);
  }
};

// Where taps × input channels are few, runs are shorter than a vector: there the vectors may also
// run over output channels, and every place of the window is added, with zero gradient for the
// losers. Cycles per pooled output and channel by either way, from 2 fused multiply-adds a cycle, 1
// cycle for the position, and broadcasts that bind the dense way to about 1.7 a cycle.
inline bool dense_is_cheaper(const ConvBlockShape& s, bool aligned,
                             const std::vector<Pass>& passes) {
  // The dense way reads under every place, so all of them must lie inside the map.
  if (s.pool_pad_h > 0 || s.pool_pad_w > 0 ||
      (s.out_h - 1) * s.pool_stride_h + s.pool_h > s.conv_h ||
      (s.out_w - 1) * s.pool_stride_w + s.pool_w > s.conv_w)
    return false;
  double sparse = 0;
  for (const Pass& pass : passes) sparse += pass.sums() / (aligned ? 2. : 1.) + 1;
  const double elements = double(s.kernel_h * s.kernel_w * s.C * s.window());
  return elements * 0.6 / L * round_up(s.K, L) / s.K < sparse;
}

// Elements of dW in registers together: 12 of 16, or 27 of 32, a whole 3 × 3 × 3 kernel.
constexpr int kMaxElements = L == 16 ? 27 : 12;

// dw[r, e] += Σ_p Σ_q [code = q] g[p] · x[window(p) + place(q) + run[r] + e] for one vector of
// output channels; g and codes [pixels, stride].
template <int kRuns, int kLength>
void add_dense(const float* x, const int64_t* run, const int64_t* window, const int64_t* place,
               int64_t places, const float* g, const uint8_t* code, int64_t stride, int64_t pixels,
               float* dw, float* db) {
  Vec sum[kRuns][kLength], grads = Vec::zero();
  for (int r = 0; r < kRuns; ++r)
    for (int e = 0; e < kLength; ++e) sum[r][e] = Vec::load(dw + (r * kLength + e) * L);
  for (int64_t p = 0; p < pixels; ++p) {
    const Vec grad = Vec::load(g + p * stride);
    const Vec winner = code ? Vec::load(code + p * stride) : Vec::zero();
    for (int64_t q = 0; q < places; ++q) {
      const Vec mine = Vec::select(Vec::equal(winner, Vec::set(float(q))), grad, Vec::zero());
#pragma GCC unroll 3
      for (int r = 0; r < kRuns; ++r) {
        const float* src = in_register(x + window[p] + place[q] + run[r]);
#pragma GCC unroll 27
        for (int e = 0; e < kLength; ++e) sum[r][e] = Vec::fma(Vec::set(src[e]), mine, sum[r][e]);
      }
      grads = grads + mine;
    }
  }
  for (int r = 0; r < kRuns; ++r)
    for (int e = 0; e < kLength; ++e) sum[r][e].store(dw + (r * kLength + e) * L);
  if (db) (Vec::load(db) + grads).store(db);
}

using AddDense = void (*)(const float*, const int64_t*, const int64_t*, const int64_t*, int64_t,
                          const float*, const uint8_t*, int64_t, int64_t, float*, float*);
template <int... kLengthLessOne>
AddDense add_dense_for(int64_t runs, int64_t length,
                       std::integer_sequence<int, kLengthLessOne...>) {
  static constexpr AddDense kTable[] = {add_dense<1, kLengthLessOne + 1>...};
  if (runs == 1) return kTable[length - 1];
  return length == 3 ? add_dense<3, 3> : add_dense<3, kMaxElements / 3>;
}

// All three runs of a 3 × 3 kernel over one channel, and over three where the registers hold them;
// else parts of one run at a time.
struct DenseBlock {
  int64_t run, runs, first, length;
};
inline std::vector<DenseBlock> dense_blocks(const Runs& runs) {
  if (runs.count == 3 && (runs.length == 3 || 3 * runs.length == kMaxElements))
    return {{0, 3, 0, runs.length}};
  std::vector<DenseBlock> blocks;
  const int64_t parts = (runs.length + kMaxElements - 1) / kMaxElements;
  for (int64_t r = 0; r < runs.count; ++r)
    for (int64_t b = 0; b < parts; ++b) {
      const int64_t first = b * runs.length / parts, end = (b + 1) * runs.length / parts;
      blocks.push_back({r, 1, first, end - first});
    }
  return blocks;
}

template <typename T>
void backward_weight_dense(const ConvBlockShape& s, const View4<const T>& grad_out,
                           const View4<const T>& x, const uint8_t* winner, float* partial,
                           int64_t chunk, int64_t begin, int64_t end) {
  const Runs runs(s);
  const int64_t elements = runs.count * runs.length, padded_K = round_up(s.K, L);
  // Gradients of a band fill half of a 32 KiB first-level cache.
  const int64_t band = std::clamp<int64_t>(4096 / (s.out_w * padded_K), 1, s.out_h);
  const int64_t places = winner ? s.window() : 1;
  const std::vector<DenseBlock> blocks = dense_blocks(runs);
  std::vector<int64_t> place, window(band * s.out_w);
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
        pack_band(s, x, s.C, n, input.first, input.rows, packed.data);
        pack_pixels(grad_out, n, p0, rows, s.K, grad.data, {s.out_w, s.out_w * padded_K, padded_K});
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
          for (size_t b = 0; b < blocks.size(); ++b) {
            const auto& [run, count, first, length] = blocks[b];
            add_dense_for(count, length, std::make_integer_sequence<int, kMaxElements>{})(
                packed.data + first, runs.offset.data() + run, window.data(), place.data(), places,
                grad.data + k, code ? code + k : nullptr, padded_K, pixels,
                dst + (run * runs.length + first) * L, b == 0 ? dst + elements * L : nullptr);
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

// Where the outputs of a group of bands stand in a list, strip by strip of columns: rows of all
// images of one strip follow each other, so that a tile may span images.
struct Strips {
  int64_t columns, out_w, count;
  Strips(const ConvBlockShape& s, const OutputTile& tile)
      : columns(tile.columns), out_w(s.out_w), count((s.out_w + tile.columns - 1) / tile.columns) {}
  int64_t begin(int64_t strip) const { return strip * columns; }
  int64_t end(int64_t strip) const { return std::min(begin(strip + 1), out_w); }
  int64_t width(int64_t strip) const { return end(strip) - begin(strip); }
};

// One group of bands that is in memory together, and the sums over it.
template <typename T>
struct WeightGradient {
  PositionInput<T> input;
  const ConvBlockShape& s;
  const ChannelGroups groups;
  const Runs runs;
  const std::vector<Pass> passes;
  const OutputTile tile;
  const Strips strips;
  const int64_t group_floats;  // of dW, one group of input channels
  int64_t packed_size;
  Scratch<Operand> packed;
  Scratch<float> dw, db;
  ChannelMajor grads;

  explicit WeightGradient(const ConvBlockShape& shape)
      : input(shape),
        s(input.shape),
        groups(s),
        runs(groups.shape),
        passes(passes_over(runs, kMaxSums)),
        tile(groups.shape),
        strips(s, tile),
        group_floats(s.K * floats_of(passes)) {}

  void reserve(int64_t images, int64_t rows) {
    packed_size = packed_floats(groups.shape, rows);
    packed.reserve(images * packed_size);
    std::fill_n(packed.data, images * packed_size, static_cast<Operand>(0.f));
    input.reserve(rows);
    grads.reserve(groups.shape, s.K, images * rows * s.out_w);
    dw.reserve(groups.count * group_floats);
    db.reserve(s.K);
  }

  void clear() {
    std::fill_n(dw.data, groups.count * group_floats, 0.f);
    std::fill_n(db.data, s.K, 0.f);
  }

  // Adds pooled rows [p0, p1) of images [n0, n0 + images).
  void add(const View4<const T>& grad_out, const View4<const T>& x, const uint8_t* winner,
           int64_t n0, int64_t images, int64_t p0, int64_t p1) {
    const int64_t first = Band(s, p0, p1).first;
    const int64_t rows = p1 - p0, pixels = images * rows * s.out_w;
    for (int64_t strip = 0; strip < strips.count; ++strip)
      for (int64_t i = 0; i < images; ++i)
        grads.fill(groups.shape, grad_out, winner, n0 + i, p0, p1, strips.begin(strip),
                   strips.end(strip), first,
                   images * rows * strips.begin(strip) + i * rows * strips.width(strip),
                   i * packed_size);
    for (int64_t k = 0; k < s.K; ++k)
      db.data[k] += grads.place(groups.shape, k, pixels, winner != nullptr);
    for (int64_t group = 0; group < groups.count; ++group) {
      for (int64_t i = 0; i < images; ++i)
        pack(x, n0 + i, p0, p1, group, packed.data + i * packed_size);
      for (int64_t strip = 0; strip < strips.count; ++strip)
        for (int64_t row = 0; row < images * rows; row += tile.rows)
          add_tile(images * rows * strips.begin(strip) + row * strips.width(strip),
                   std::min(tile.rows, images * rows - row) * strips.width(strip),
                   dw.data + group * group_floats);
    }
  }

  void pack(const View4<const T>& x, int64_t n, int64_t p0, int64_t p1, int64_t group,
            Operand* to) {
    input.pack(groups.shape, x, n, p0, p1, groups.begin(group), groups.width(group, s.C), to);
  }

  // Adds `count` outputs from place `at` of the list on.
  void add_tile(int64_t at, int64_t count, float* dst) const {
    for (const Pass& pass : passes) {
      add_positions_for(pass)(packed.data + pass.vec * L, runs.offset.data() + pass.run,
                              grads.factors() + at, grads.at.data + at, grads.stride, count, s.K,
                              dst);
      dst += s.K * pass.sums() * L;
    }
  }

  // [group][pass][channel][runs, vectors] → [K, taps × C | bias]
  void store(float* to) const {
    const int64_t row = input.elements + 1, C = input.patches ? input.elements : s.C;
    const float* src = dw.data;
    for (int64_t group = 0; group < groups.count; ++group)
      for (const Pass& pass : passes)
        for (int64_t k = 0; k < s.K; ++k)
          for (int64_t r = 0; r < pass.runs; ++r, src += pass.vecs * L) {
            float run[kMaxSums * L];
            for_elements_of_sums(pass.vecs, [&](int64_t place, int64_t i) { run[place] = src[i]; });
            for_pieces(runs, pass, r, groups, group, C, [&](int64_t at, int64_t e, int64_t n) {
              std::copy_n(run + at, n, to + k * row + e);
            });
          }
    for (int64_t k = 0; k < s.K; ++k) to[(k + 1) * row - 1] = db.data[k];
  }
};

// Outputs whose gradients and offsets, 12 bytes each, are in memory together: some of a
// second-level cache.
constexpr int64_t kGroupOutputs = 16384;

template <typename T>
void backward_weight(const ConvBlockShape& s, const View4<const T>& grad_out,
                     const View4<const T>& x, const uint8_t* winner, float* partial, int64_t chunk,
                     int64_t begin, int64_t end) {
  if (columns_are_cheaper(s))
    return backward_weight_columns<T>(s, grad_out, x, winner, partial, chunk, begin, end);
  WeightGradient<T> sum(s);
  if (dense_is_cheaper(s, sum.s.C % L == 0, sum.passes))
    return backward_weight_dense(s, grad_out, x, winner, partial, chunk, begin, end);
  // A group is one band of one image, or several images that are one band each.
  const int64_t band = band_rows(sum.groups.shape), bands = (s.out_h + band - 1) / band;
  const int64_t most =
      std::clamp<int64_t>(kGroupOutputs / (s.K * s.out_h * s.out_w), 1, std::min(chunk, s.N));
  const int64_t images =
      images_in_group(s, bands, packed_floats(sum.groups.shape, std::min(band, s.out_h)), most);
  sum.reserve(images, std::min(band, s.out_h));
  for (int64_t unit = begin; unit < end; ++unit) {
    sum.clear();
    const int64_t n_end = std::min((unit + 1) * chunk, s.N);
    for (int64_t n = unit * chunk; n < n_end; n += images)
      for (int64_t p0 = 0; p0 < s.out_h; p0 += band)
        sum.add(grad_out, x, winner, n, std::min(images, n_end - n), p0,
                std::min(p0 + band, s.out_h));
    sum.store(partial + unit * s.K * (s.kernel_h * s.kernel_w * s.C + 1));
  }
}
