// Packing and unpacking of the conv block over Vec; part of conv_block_kernels.h.

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Pixels of channels-innermost memory, row by row: pixel p lies at offset(p).
struct Pixels {
  int64_t width, row_stride, pixel_stride;
  int64_t offset(int64_t p) const { return p / width * row_stride + p % width * pixel_stride; }

  // Offsets of pixels p … p + kCount - 1.
  template <int kCount>
  void offsets(int64_t p, int64_t (&at)[kCount]) const {
    int64_t column = p % width, offset = p / width * row_stride + column * pixel_stride;
    for (int64_t& o : at) {
      o = offset;
      offset += pixel_stride;
      if (++column == width) column = 0, offset += row_stride - width * pixel_stride;
    }
  }
};

// Calls block(c, p, at) for square blocks that cover channels × pixels, pixels ≥ kSide, at = the
// offsets of the block's pixels. The last ones of each direction overlap those before. The inner
// loop goes over pixels: on the side where each channel is a run of memory, only kSide runs are
// open at a time, which strides of a power of two would otherwise drive out of the cache half
// written.
template <int kSide, typename F>
void for_squares(int64_t channels, int64_t pixels, const Pixels& layout, const F& block) {
  for (int64_t c = 0; c < channels; c += kSide)
    for (int64_t p = 0; p < pixels; p += kSide) {
      int64_t at[kSide];
      const int64_t first = std::min(p, pixels - kSide);
      layout.offsets(first, at);
      block(std::max<int64_t>(std::min(c, channels - kSide), 0), first, at);
    }
}

#if defined(FASTCLS_AVX512)

// Whole cache lines on both sides. The channels are runs of memory whose beginnings no prefetcher
// guesses, so that those of the next block of channels are asked for while this one is moved; past
// the last one comes the next image, or nothing that matters.
template <typename S, typename E>
void channels_to_pixels_16(const S* src, int64_t channel_stride, int64_t channels, int64_t pixels,
                           E* dst, const Pixels& layout) {
  for_squares<16>(channels, pixels, layout, [&](int64_t c, int64_t p, const int64_t (&at)[16]) {
    const S* from = src + c * channel_stride + p;
    __m512 lanes[16];
    for (int e = 0; e < 16; ++e) {
      lanes[e] = Vec::load(from + e * channel_stride).v;
      __builtin_prefetch(from + (e + 16) * channel_stride, 0, 2);
    }
    transpose16(lanes);
    for (int e = 0; e < 16; ++e) store_operands({lanes[e]}, dst + at[e] + c);
  });
}

template <typename S, typename D>
void pixels_to_channels_16(const S* src, const Pixels& layout, int64_t channels, int64_t pixels,
                           D* dst, int64_t channel_stride) {
  for_squares<16>(channels, pixels, layout, [&](int64_t c, int64_t p, const int64_t (&at)[16]) {
    __m512 lanes[16];
    for (int e = 0; e < 16; ++e) lanes[e] = Vec::load(src + at[e] + c).v;
    transpose16(lanes);
    D* to = dst + c * channel_stride + p;
    for (int e = 0; e < 16; ++e) store16(to + e * channel_stride, lanes[e]);
  });
}

// Rows of 3 channels: pixel by pixel R G B from three runs. Lane l of output vector v is float
// 16 v + l of the pixels, which is channel (16 v + l) % 3 of pixel (16 v + l) / 3: of the first two
// channels by one permutation, of the third by another. The last block overlaps the one before.
template <typename S, typename E>
void rgb_to_pixels(const S* src, int64_t channel_stride, int64_t rows, E* dst,
                   const Pixels& layout) {
  __m512i place[3];
  __mmask16 is_third[3];
  for (int v = 0; v < 3; ++v) {
    int32_t lanes[16];
    is_third[v] = 0;
    for (int l = 0; l < 16; ++l) {
      const int at = 16 * v + l, channel = at % 3;
      lanes[l] = at / 3 + (channel == 1 ? 16 : 0);
      if (channel == 2) is_third[v] |= static_cast<__mmask16>(1 << l);
    }
    place[v] = _mm512_loadu_si512(lanes);
  }
  for (int64_t r = 0; r < rows; ++r, dst += layout.row_stride, src += layout.width)
    for (int64_t next = 0; next < layout.width; next += 16) {
      const int64_t p = std::min(next, layout.width - 16);
      const __m512 red = Vec::load(src + p).v, green = Vec::load(src + channel_stride + p).v;
      const __m512 blue = Vec::load(src + 2 * channel_stride + p).v;
      for (int v = 0; v < 3; ++v) {
        const __m512 both = _mm512_permutex2var_ps(red, place[v], green);
        store_operands({_mm512_mask_permutexvar_ps(both, is_third[v], place[v], blue)},
                       dst + 3 * p + 16 * v);
      }
    }
}

#endif

// dst[layout.offset(p) + c] = src[c · channel_stride + p]. Fewer than 8 channels are followed by
// zeros up to 8, in ascending order of pixels: what comes after them is still to be written, or
// padding.
template <typename S, typename E>
void channels_to_pixels(const S* src, int64_t channel_stride, int64_t channels, int64_t pixels,
                        E* dst, const Pixels& layout) {
  if (pixels < 8) {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0, at = layout.offset(p); c < channels; ++c)
        dst[at + c] = static_cast<E>(static_cast<float>(src[c * channel_stride + p]));
    return;
  }
#if defined(FASTCLS_AVX512)
  if (channels == 3 && layout.pixel_stride == 3 && layout.width >= 16)
    return rgb_to_pixels(src, channel_stride, pixels / layout.width, dst, layout);
  if (channels >= 16 && pixels >= 16)
    return channels_to_pixels_16(src, channel_stride, channels, pixels, dst, layout);
#endif
  const int rows = std::min<int64_t>(channels, 8);
  for_squares<8>(channels, pixels, layout, [&](int64_t c, int64_t p, const int64_t (&at)[8]) {
    __m256 lanes[8];
    for (int e = 0; e < 8; ++e)
      lanes[e] = e < rows ? load8(src + (c + e) * channel_stride + p) : _mm256_setzero_ps();
    transpose8(lanes);
    for (int e = 0; e < 8; ++e) store8(dst + at[e] + c, lanes[e]);
  });
}

// pixels_to_channels of fewer than 8 channels, of which 8 can be read.
template <typename D>
void pixels_to_few_channels(const float* src, const Pixels& layout, int64_t channels,
                            int64_t pixels, D* dst, int64_t channel_stride) {
  for_squares<8>(channels, pixels, layout, [&](int64_t, int64_t p, const int64_t (&at)[8]) {
    __m256 lanes[8];
    for (int e = 0; e < 8; ++e) lanes[e] = load8(src + at[e]);
    transpose8(lanes);
    for (int64_t c = 0; c < channels; ++c) store8(dst + c * channel_stride + p, lanes[c]);
  });
}

// dst[c · channel_stride + p] = src[layout.offset(p) + c]
template <typename S, typename D>
void pixels_to_channels(const S* src, const Pixels& layout, int64_t channels, int64_t pixels,
                        D* dst, int64_t channel_stride) {
  if (pixels < 8 || channels < 8) {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0, at = layout.offset(p); c < channels; ++c)
        dst[c * channel_stride + p] = static_cast<D>(static_cast<float>(src[at + c]));
    return;
  }
#if defined(FASTCLS_AVX512)
  if (channels >= 16 && pixels >= 16)
    return pixels_to_channels_16(src, layout, channels, pixels, dst, channel_stride);
#endif
  for_squares<8>(channels, pixels, layout, [&](int64_t c, int64_t p, const int64_t (&at)[8]) {
    __m256 lanes[8];
    for (int e = 0; e < 8; ++e) lanes[e] = load8(src + at[e] + c);
    transpose8(lanes);
    for (int e = 0; e < 8; ++e) store8(dst + (c + e) * channel_stride + p, lanes[e]);
  });
}

template <typename S, typename D>
void copy_row(const S* src, int64_t n, D* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store8(dst + i, load8(src + i));
  for (; i < n; ++i) dst[i] = static_cast<D>(static_cast<float>(src[i]));
}
inline void copy_row(const BFloat16* src, int64_t n, BFloat16* dst) { std::copy_n(src, n, dst); }

// ---------------------------------------------------------------------------- packing, unpacking

// Channels-innermost copy of `rows` rows of image n.
template <typename T, typename E>
void pack_pixels(const View4<const T>& x, int64_t n, int64_t first, int64_t rows, int64_t channels,
                 E* dst, const Pixels& layout) {
  const int64_t width = layout.width;
  if (x.w == 1 && x.h == width && channels > 1)  // each channel is one run of memory
    return channels_to_pixels(x.at(n, 0, first, 0), x.c, channels, rows * width, dst, layout);
  for (int64_t r = 0; r < rows; ++r, dst += layout.row_stride) {
    const T* src = x.at(n, 0, first + r, 0);
    if (x.w == channels && layout.pixel_stride == channels && (x.c == 1 || channels == 1))
      copy_row(src, width * channels, dst);
    else if (x.c == 1)
      for (int64_t w = 0; w < width; ++w)
        copy_row(src + w * x.w, channels, dst + w * layout.pixel_stride);
    else
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t w = 0; w < width; ++w)
          dst[w * layout.pixel_stride + c] =
              static_cast<E>(static_cast<float>(src[c * x.c + w * x.w]));
  }
}

template <typename E>
void fill_zero(E* to, int64_t n) {
  std::memset(static_cast<void*>(to), 0, n * sizeof(E));
}

// Rows [first, first + rows) of the zero-padded image, counted from the top of the padding. Pixels
// are s.C wide; the first `channels` of each are written.
template <typename T, typename E>
void pack_band(const ConvBlockShape& s, const View4<const T>& x, int64_t channels, int64_t n,
               int64_t first, int64_t rows, E* dst) {
  const int64_t row_stride = (s.W + 2 * s.pad_w) * s.C;
  const int64_t top = std::clamp<int64_t>(s.pad_h - first, 0, rows);
  const int64_t inside = std::clamp<int64_t>(s.pad_h + s.H - first, top, rows) - top;
  fill_zero(dst, top * row_stride);
  fill_zero(dst + (top + inside) * row_stride, (rows - top - inside) * row_stride);
  E* body = dst + top * row_stride;
  if (s.pad_w > 0)
    for (int64_t r = 0; r < inside; ++r) {
      fill_zero(body + r * row_stride, s.pad_w * s.C);
      fill_zero(body + (r + 1) * row_stride - s.pad_w * s.C, s.pad_w * s.C);
    }
  pack_pixels(x, n, first + top - s.pad_h, inside, channels, body + s.pad_w * s.C,
              {s.W, row_stride, s.C});
}

// The way back, to rows of image n of y, which is dense in either memory format.
template <typename T>
void unpack_pixels(const float* src, const Pixels& layout, const View4<T>& y, int64_t n,
                   int64_t first, int64_t rows, int64_t channels) {
  const int64_t pixels = rows * layout.width;
  T* to = y.at(n, 0, first, 0);
  if (y.c != 1 && channels < 8 && pixels >= 8)
    return pixels_to_few_channels(src, layout, channels, pixels, to, y.c);
  if (y.c != 1) return pixels_to_channels(src, layout, channels, pixels, to, y.c);
  for (int64_t r = 0; r < rows; ++r, src += layout.row_stride) {
    T* dst = y.at(n, 0, first + r, 0);
    if (layout.pixel_stride == channels && y.w == channels)
      copy_row(src, layout.width * channels, dst);
    else
      for (int64_t w = 0; w < layout.width; ++w)
        copy_row(src + w * layout.pixel_stride, channels, dst + w * y.w);
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
