// Packing and unpacking of the conv block over Vec; part of conv_block_kernels.h.

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
