// Gradient of the conv block's input over Vec; part of conv_block_kernels.h.

#if !defined(FASTCLS_AVX512)

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

#endif

// The lanes of x whose bit is set go to g, their numbers (from `first` on) to channel; returns how
// many. Writes a whole vector; what lies behind the chosen ones means nothing.
[[gnu::always_inline]] inline int64_t store_chosen(Vec x, unsigned bits, int first, Operand* g,
                                                   int32_t* channel) {
#if defined(FASTCLS_AVX512)
  // Compressed in a register: straight to memory takes some processors a hundred cycles.
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 chosen = static_cast<__mmask16>(bits);
  store_operands({_mm512_maskz_compress_ps(chosen, x.v)}, g);
  _mm512_storeu_si512(channel, _mm512_maskz_compress_epi32(
                                   chosen, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
#else
  const __m256i lanes =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lane[bits])));
  _mm256_storeu_ps(g, _mm256_permutevar8x32_ps(x.v, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(channel),
                      _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
#endif
  return __builtin_popcount(bits);
}

// The open channels of some windows, by winner: the entries of g and channel from begin[p · places
// + q] to the next are those of window p and place q.
struct Buckets {
  Scratch<Operand> g;
  Scratch<int32_t> channel, begin;
  int64_t places = 0;

  void reserve(int64_t pixels, int64_t places_of_a_window, int64_t channels) {
    places = places_of_a_window;
    g.reserve(pixels * channels + L), channel.reserve(pixels * channels + L);
    begin.reserve(pixels * places + 1);
  }

  // grad and codes [pixels, stride] start at the block's first channel.
  void fill(int64_t pixels, int64_t channels, const float* grad, const uint8_t* codes,
            int64_t stride) {
    int32_t n = 0, *bucket = begin.data;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t q = 0; q < places; ++q) {
        *bucket++ = n;
        for (int64_t k = 0; k < channels; k += L) {
          const Vec value = Vec::load(grad + p * stride + k);
          unsigned bits = (1u << std::min<int64_t>(L, channels - k)) - 1;
          bits &= ~Vec::bits(Vec::equal(value, Vec::zero()));  // dropout leaves many zeros
          if (codes)
            bits &= Vec::bits(Vec::equal(Vec::load(codes + p * stride + k), Vec::set(float(q))));
          n += store_chosen(value, bits, k, g.data + n, channel.data + n);
        }
      }
    *bucket = n;
  }
};

// dX is loaded and stored once per bucket: the more channels' weights of a pass stay in the cache,
// the longer the buckets are. Three quarters of a first-level cache of 32 KiB, and of the 48 KiB
// that processors with AVX-512 have.
constexpr int64_t kInputWeights = (L == 16 ? 36864 : 24576) / sizeof(Operand);

// The weights as the gradient of the input reads them: [channel block][group][pass][channel][runs,
// vectors], zero past each run, then a row of zeros.
struct InputWeights {
  const ConvBlockShape& s;
  const ChannelGroups groups;
  const Runs runs;
  const std::vector<Pass> passes;
  int64_t block;  // channels whose weights of a pass are together in the cache

  explicit InputWeights(const ConvBlockShape& shape)
      : s(shape), groups(s), runs(groups.shape), passes(passes_over(runs, kMaxSums)) {
    int64_t sums = 0;
    for (const Pass& pass : passes) sums = std::max(sums, pass.sums());
    block = std::clamp<int64_t>(kInputWeights / (sums * L) / L * L, L, 128);
  }
  int64_t blocks() const { return (s.K + block - 1) / block; }
  // Elements before channel k, which a block begins with, or the row of zeros.
  int64_t before(int64_t k) const { return k * groups.count * floats_of(passes); }
  int64_t count() const { return before(s.K) + kMaxSums * L; }

  void pack(const DenseWeight& weight, int64_t b, Operand* packed) const {
    const int64_t k0 = b * block, k1 = std::min(k0 + block, s.K);
    Operand* to = packed + before(k0);
    for (int64_t group = 0; group < groups.count; ++group)
      for (const Pass& pass : passes)
        for (int64_t k = k0; k < k1; ++k, to += pass.sums() * L)
          pack_channel(weight, group, pass, k, to);
    if (k1 == s.K) std::fill_n(to, kMaxSums * L, static_cast<Operand>(0.f));
  }

 private:
  void pack_channel(const DenseWeight& weight, int64_t group, const Pass& pass, int64_t k,
                    Operand* to) const {
    float row[kMaxSums * L];
    std::fill_n(row, pass.sums() * L, 0.f);
    const float* of_k = weight.data + k * s.kernel_h * s.kernel_w * s.C;
    for (int64_t r = 0; r < pass.runs; ++r)
      for_pieces(runs, pass, r, groups, group, s.C, [&](int64_t at, int64_t from, int64_t n) {
        const float* first = of_k + from / s.C * weight.tap + from % s.C * weight.channel;
        float* piece = row + r * pass.vecs * L + at;
        for (int64_t i = 0; i < n; ++i) piece[i] = first[i * weight.channel];
      });
    for_elements_of_sums(
        pass.sums(), [&](int64_t place, int64_t i) { to[place] = static_cast<Operand>(row[i]); });
  }
};

inline int64_t packed_input_floats(const ConvBlockShape& s) {
  return (InputWeights(s).count() + kPerLane<Operand> - 1) / kPerLane<Operand>;
}
inline int64_t packed_input_blocks(const ConvBlockShape& s) { return InputWeights(s).blocks(); }
inline void pack_input_weight(const ConvBlockShape& s, const DenseWeight& weight, int64_t block,
                              float* packed) {
  InputWeights(s).pack(weight, block, reinterpret_cast<Operand*>(packed));
}

// The gradient of the input of one image.
template <typename T>
struct InputGradient : InputWeights {
  const Operand* weight;
  const OutputTile tile;
  const int64_t row, group_floats, padded_K, places;
  std::vector<int64_t> place, window;  // offsets of a window's places; of each output of a tile
  Scratch<float> dx, grad;
  Scratch<uint8_t> codes;
  Buckets buckets;

  InputGradient(const ConvBlockShape& shape, const Operand* packed, bool has_winner)
      : InputWeights(shape),
        weight(packed),
        tile(groups.shape),
        row((s.W + 2 * s.pad_w) * groups.channels),
        group_floats((s.H + 2 * s.pad_h) * row),
        padded_K(round_up(s.K, L)),
        places(has_winner ? s.window() : 1) {
    for (int64_t q = 0; q < places; ++q) place.push_back(place_offset(groups.shape, q));
    window.resize(tile.rows * tile.columns);
    dx.reserve(groups.count * group_floats);
    grad.reserve(tile.rows * tile.columns * padded_K);
    codes.reserve(tile.rows * tile.columns * padded_K);
    buckets.reserve(tile.rows * tile.columns, places, block);
  }

  const Operand* no_row() const { return weight + before(s.K); }

  // Adds the outputs of rows [p0, p1) × columns [w0, w1) of image n.
  void add(const View4<const T>& grad_out, const uint8_t* winner, int64_t n, int64_t p0, int64_t p1,
           int64_t w0, int64_t w1) {
    const int64_t width = w1 - w0, pixels = (p1 - p0) * width;
    pack_pixels(grad_out.from_column(w0), n, p0, p1 - p0, s.K, grad.data,
                {width, width * padded_K, padded_K});
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t ph = p0 + p / width, pw = w0 + p % width;
      window[p] = window_offset(groups.shape, ph, pw, 0);
      if (winner)
        std::copy_n(winner + ((n * s.out_h + ph) * s.out_w + pw) * s.K, s.K,
                    codes.data + p * padded_K);
    }
    const Operand* w = weight;
    for (int64_t k0 = 0; k0 < s.K; k0 += block) {
      const int64_t channels = std::min(block, s.K - k0);
      buckets.fill(pixels, channels, grad.data + k0, winner ? codes.data + k0 : nullptr, padded_K);
      for (int64_t group = 0; group < groups.count; ++group)
        for (const Pass& pass : passes) {
          add_windows(pass, dx.data + group * group_floats + pass.vec * L, w, pixels);
          w += channels * pass.sums() * L;
        }
    }
  }

  void add_windows(const Pass& pass, float* to, const Operand* w, int64_t pixels) const {
    const AddChannels add = add_channels_for(pass);
    const int64_t tail = std::min<int64_t>(runs.length - (pass.vec + pass.vecs - 1) * L, L);
    add(to, runs.offset.data() + pass.run, w,
        {window.data(), pixels, places, buckets.begin.data, buckets.g.data, buckets.channel.data,
         no_row()},
        place.data(), tail);
  }

  void image(const View4<const T>& grad_out, const uint8_t* winner, int64_t n,
             const View4<T>& grad_input) {
    std::fill_n(dx.data, groups.count * group_floats, 0.f);
    for (int64_t p0 = 0; p0 < s.out_h; p0 += tile.rows)
      for (int64_t w0 = 0; w0 < s.out_w; w0 += tile.columns)
        add(grad_out, winner, n, p0, std::min(p0 + tile.rows, s.out_h), w0,
            std::min(w0 + tile.columns, s.out_w));
    for (int64_t group = 0; group < groups.count; ++group)
      unpack_pixels(dx.data + group * group_floats + s.pad_h * row + s.pad_w * groups.channels,
                    {s.W, row, groups.channels}, grad_input.from_channel(groups.begin(group)), n, 0,
                    s.H, groups.width(group, s.C));
  }
};

template <typename T>
void backward_input(const ConvBlockShape& s, const View4<const T>& grad_out, const float* packed,
                    const uint8_t* winner, const View4<T>& grad_input, int64_t begin, int64_t end) {
  InputGradient<T> gradient(s, reinterpret_cast<const Operand*>(packed), winner != nullptr);
  for (int64_t n = begin; n < end; ++n) gradient.image(grad_out, winner, n, grad_input);
}
