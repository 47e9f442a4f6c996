// A conv block as a matrix product whose operands are never written to memory, on the matrix unit
// or with float multiply-adds. Serves the forward pass (conv_block_forward.cu) and, as the
// convolution of the gradient with the mirrored weight, dX (conv_block_backward_input.cu).
//
//   rows: positions of the conv map     columns: output channels     sum: taps x input channels
//
// A block owns `columns` output channels, whose weights stay in shared memory, and goes from box to
// box of the outputs (GemmTile). Of the input only the patch under a box is loaded, once for all
// taps, while the box before is multiplied. Where a row finds its operand for a tap is an address:
// its own place in the patch plus the tap's. A thread holds the sums of one column's 2 x 2 window,
// so that bias, ReLU, pool and winner happen in registers.
//
// A warp has kGroups x 32 rows and kTilesN x 8 columns. Its thread 4 g + t holds the sums of
// fragment (m, n), sums[m][n][2 h + e], of row 16 m + 8 h + g and column 8 n + 2 t + e: the layout
// of the matrix unit, kept by the float kernels too.
#pragma once

#include "conv_block.h"
#include "cuda/common.h"
#include "cuda/conv_block_kernels.h"
#include "cuda/tiles.h"

namespace fastcls::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// ---- arithmetic

// 16 bytes of channels.
template <typename Element>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(Element);
  Element e[kSize];
};

template <typename To, typename From>
__device__ inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Operands of type T in shared memory as `Element`; rounded() is what the unit would read of a
// value.
struct Bf16Math {
  using Element = BFloat16;
  static constexpr Arithmetic kArithmetic = Arithmetic::kBf16;
  __device__ static Element rounded(float x) { return static_cast<BFloat16>(x); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
};

struct F16Math {
  using Element = Half;
  static constexpr Arithmetic kArithmetic = Arithmetic::kF16;
  __device__ static Element rounded(float x) { return static_cast<Half>(x); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(d, a, b0, b1);
  }
};

struct Tf32Math {
  using Element = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::kTf32;
  __device__ static Element rounded(float x) { return bits_as<float>(to_tf32(x)); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_tf32(d, a, b0, b1);
  }
};

struct FloatMath {
  using Element = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::kFloat;
  __device__ static Element rounded(float x) { return x; }
};

template <typename Math>
struct Layout {
  static constexpr GemmConfig kConfig = gemm_config(Math::kArithmetic, false, 0);
  static constexpr bool kMatrixUnit = kConfig.matrix_unit;
  static constexpr int kGroups = kConfig.groups, kThreads = kConfig.warps * kWarpSize;
};

__device__ inline unsigned divide(unsigned n, const Divider& by) {
  return by.divisor == 1 ? n : __umulhi(n, by.reciprocal);
}

// Quotient and, in `n`, remainder.
__device__ inline int split(unsigned& n, const Divider& by) {
  const unsigned quotient = divide(n, by), rest = n - quotient * by.divisor;
  n = quotient;
  return static_cast<int>(rest);
}

// Calls f(math) with a value of the arithmetic's type.
template <typename F>
void dispatch_arithmetic(Arithmetic a, const F& f) {
  switch (a) {
    case Arithmetic::kBf16:
      return f(Bf16Math{});
    case Arithmetic::kF16:
      return f(F16Math{});
    case Arithmetic::kTf32:
      return f(Tf32Math{});
    case Arithmetic::kFloat:
      return f(FloatMath{});
  }
}

// ---- where things are

// The box that a block works at: its first image and output, and the first pixel of its patch.
struct Box {
  int n, out_h, out_w, conv_h, conv_w, h, w;
};

__device__ inline Box box_at(const ConvBlockShape& s, const GemmTile& t, unsigned i) {
  Box b;
  b.out_w = split(i, t.by_boxes_w) * t.box_w;
  b.out_h = split(i, t.by_boxes_h) * t.box_h;
  b.n = static_cast<int>(i) * t.images;
  b.conv_h = b.out_h * static_cast<int>(s.pool_stride_h) - static_cast<int>(s.pool_pad_h);
  b.conv_w = b.out_w * static_cast<int>(s.pool_stride_w) - static_cast<int>(s.pool_pad_w);
  b.h = b.conv_h * static_cast<int>(s.stride_h) - static_cast<int>(s.pad_h);
  b.w = b.conv_w * static_cast<int>(s.stride_w) - static_cast<int>(s.pad_w);
  return b;
}

// A unit of the box: image, row and column in it.
struct Unit {
  int image, y, x;
};

__device__ inline Unit unit_at(const GemmTile& t, int index) {
  unsigned rest = index;
  const int x = split(rest, t.by_unit_w), y = split(rest, t.by_unit_h);
  return {static_cast<int>(rest), y, x};
}

// Bytes from the start of a row of the patch to its column x, and to the run that starts there.
__device__ inline int column_offset(const GemmTile& t, int x) {
  if (t.copy_bytes) return (x & ~1) * t.pixel_bytes + (x & 1) * t.copy_bytes;
  if (t.interleave == 1) return x * t.pixel_bytes;
  unsigned column = x;
  const int phase = split(column, t.by_interleave);
  return (phase * t.run + static_cast<int>(column)) * t.pixel_bytes;
}

// A warp's place among those that share out the rows. With fewer units than rows the last places
// are idle: the two blocks of a multiprocessor, most likely one of either half of the grid, leave
// other quarters of it idle.
__device__ inline int row_warp() {
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x, blocks = gridDim.x * gridDim.y;
  const unsigned first = 2 * block < blocks ? 0 : 2 * kWarpSize;  // blockDim is a power of 2
  return static_cast<int>(((threadIdx.x + first) & (blockDim.x - 1)) / kWarpSize);
}

// Where a row of the product has its first tap in the patch. Rows beyond the last unit read the
// last one's pixels: their sums are not stored.
template <bool kFold>
__device__ int row_offset(const ConvBlockShape& s, const GemmTile& t, int row) {
  int index = row, below = 0, right = 0;
  if (t.pooling == Pooling::kWindow) {
    index = row / 32 * 8 + row % 8;
    below = row / 16 % 2 * static_cast<int>(s.stride_h) * t.row_bytes;
    // Otherwise this step is in the table of taps: see fill_table.
    if (kFold) right = row / 8 % 2 * static_cast<int>(s.stride_w);
  }
  const int last = static_cast<int>(t.units) - 1;
  const Unit u = unit_at(t, index < last ? index : last);
  const int along = kFold ? column_offset(t, u.x * t.step_w + right) : u.x * t.step_bytes;
  return u.image * t.image_bytes + u.y * t.step_h * t.row_bytes + below + along;
}

// The way from a row's first tap to its others: per tap, first for rows of the left half of a
// window, then for those of the right.
template <bool kFold>
__device__ void fill_table(const ConvBlockShape& s, const GemmTile& t, int* table) {
  const int across = kFold ? 1 : static_cast<int>(s.kernel_w);
  for (int i = threadIdx.x; i < t.table_entries; i += blockDim.x) {
    const int tap = i % t.taps;
    const int right = !kFold && i >= t.taps && t.pooling == Pooling::kWindow ? s.stride_w : 0;
    const int row = tap / across * static_cast<int>(s.dilation_h);
    const int column = tap % across * static_cast<int>(s.dilation_w) + right;
    table[i] = row * t.row_bytes + column_offset(t, column);
  }
}

// ---- loading

// A tensor [N, C, H, W] of strides that 32 bits hold: every index takes one multiply-add.
template <typename T>
struct NarrowView {
  T* data;
  int n, c, h, w;
  __device__ T* at(int in, int ic, int ih, int iw) const {
    const int64_t image = multiply_add_wide(in, n, 0), channel = multiply_add_wide(ic, c, image);
    return data + multiply_add_wide(iw, w, multiply_add_wide(ih, h, channel));
  }
};

template <typename T>
NarrowView<T> narrowed(const View4<T>& v) {
  return {v.data, static_cast<int>(v.n), static_cast<int>(v.c), static_cast<int>(v.h),
          static_cast<int>(v.w)};
}

// A pixel of the patch: elements from the box's first pixel to it, bytes from the patch's start,
// and how far from the box's first pixel it is. The same for all boxes, so that it is in a table.
struct alignas(kPatchEntryBytes) PatchEntry {
  int from, to, y_x, image;
  __device__ int y() const { return y_x & 0xffff; }
  __device__ int x() const { return y_x >> 16; }
};

// Pixel `i` of the patch, `from` left out.
__device__ inline PatchEntry patch_entry(const GemmTile& t, unsigned i) {
  const int x = split(i, t.by_patch_w), y = split(i, t.by_patch_h), image = static_cast<int>(i);
  const int column = t.copy_bytes ? x * t.pixel_bytes : column_offset(t, x);  // of the first copy
  return {0, image * t.image_bytes + y * t.row_bytes + column, x << 16 | y, image};
}

// Does the pixel lie in a tensor [N, ., H, W], and not in its padding?
__device__ inline bool is_inside(const ConvBlockShape& s, const Box& box, const PatchEntry& pixel) {
  return static_cast<unsigned>(box.h + pixel.y()) < static_cast<unsigned>(s.H) &&
         static_cast<unsigned>(box.w + pixel.x()) < static_cast<unsigned>(s.W) &&
         box.n + pixel.image < static_cast<int>(s.N);
}

// The 16 bytes of channels that are item `i` of the patch: neighbouring threads take what lies side
// by side in memory.
struct PatchItem {
  unsigned pixel;
  int vector;
};

__device__ inline PatchItem patch_item(const GemmTile& t, bool channels_inner, unsigned i) {
  const unsigned rest = split(i, channels_inner ? t.by_vectors : t.by_pixels);
  return channels_inner ? PatchItem{i, static_cast<int>(rest)}
                        : PatchItem{rest, static_cast<int>(i)};
}

// The input as the product's operand: copied as it is.
template <typename Math>
struct InputSource {
  using Element = typename Math::Element;
  static constexpr bool kRounded = false;
  NarrowView<const Element> x;  // [N, C, H, W]
  bool channels_inner;          // in memory
  bool async;                   // channels lie in aligned 16-byte vectors

  __device__ void fill_table(const GemmTile& t, PatchEntry* table) const {
    for (unsigned i = threadIdx.x; i < static_cast<unsigned>(t.pixels); i += blockDim.x) {
      PatchEntry pixel = patch_entry(t, i);
      pixel.from = pixel.image * x.n + pixel.y() * x.h + pixel.x() * x.w;
      table[i] = pixel;
    }
  }

  __device__ void load_patch(const ConvBlockShape& s, const GemmTile& t, const PatchEntry* table,
                             unsigned char* patch, const Box& box, int chunk) const {
    const int64_t origin = first_pixel(box);
    const unsigned items = t.pixels * t.by_vectors.divisor;
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < items; i += blockDim.x) {
      const PatchItem item = patch_item(t, channels_inner, i);
      const PatchEntry pixel = table[item.pixel];
      const int c = chunk * t.channels + item.vector * Vector<Element>::kSize;
      const bool inside = is_inside(s, box, pixel) && c < static_cast<int>(s.C);
      const Element* from = x.data + (inside ? multiply_add_wide(c, x.c, origin + pixel.from) : 0);
      load_vector(s, patch + pixel.to + item.vector * 16, from, c, inside);
    }
  }

  __device__ void load_folded(const ConvBlockShape& s, const GemmTile& t, const PatchEntry* table,
                              unsigned char* patch, const Box& box) const {
    if (t.channels == 4)
      load_folded<4>(s, t, table, patch, box);
    else
      load_folded<8>(s, t, table, patch, box);
  }

 private:
  __device__ int64_t first_pixel(const Box& box) const {
    const int64_t image = multiply_add_wide(box.n, x.n, 0);
    return multiply_add_wide(box.w, x.w, multiply_add_wide(box.h, x.h, image));
  }

  // Channels [c, c + 8) or, in 4 bytes each, [c, c + 4).
  __device__ void load_vector(const ConvBlockShape& s, unsigned char* to, const Element* from,
                              int c, bool inside) const {
    if (async) return copy_async(to, from, !inside);
    Vector<Element> v;
#pragma unroll
    for (int i = 0; i < v.kSize; ++i)
      v.e[i] = inside && c + i < s.C ? from[static_cast<int64_t>(i) * x.c] : Math::rounded(0.0f);
    *reinterpret_cast<Vector<Element>*>(to) = v;
  }

  // A folded patch of kChannels to a pixel, several pixels at a time, for their channels have to
  // pass through registers.
  template <int kChannels>
  __device__ void load_folded(const ConvBlockShape& s, const GemmTile& t, const PatchEntry* table,
                              unsigned char* patch, const Box& box) const {
    constexpr int kBytes = kChannels * sizeof(Element), kAtOnce = kBytes <= 16 ? 2 : 1;
    struct alignas(kBytes < 16 ? kBytes : 16) Pixel {
      Element e[kChannels];
    };
    const int64_t origin = first_pixel(box);
    const unsigned pixels = t.pixels;
#pragma unroll 1
    for (unsigned first = threadIdx.x; first < pixels; first += kAtOnce * blockDim.x) {
      Pixel values[kAtOnce];
      int to[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned item = first + i * blockDim.x;
        const PatchEntry pixel = table[item < pixels ? item : 0];
        const bool inside = is_inside(s, box, pixel);
        const Element* const from = x.data + (inside ? origin + pixel.from : 0);
        to[i] = pixel.to;
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          values[i].e[c] =
              inside && c < s.C ? from[static_cast<int64_t>(c) * x.c] : Math::rounded(0.0f);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * blockDim.x >= pixels) break;
        *reinterpret_cast<Pixel*>(patch + to[i]) = values[i];
        // Column x starts the run x - 1 of the other copy. That of column 0 is where nobody reads:
        // the last one of the row before, or the room between the copies.
        if (kBytes == 8)
          *reinterpret_cast<Pixel*>(patch + t.copy_bytes + to[i] - kBytes) = values[i];
      }
    }
  }
};

// A tensor whose channels lie in aligned 16-byte vectors.
template <typename T>
bool channels_are_vectors(const View4<T>& v, int64_t channels) {
  constexpr int64_t kVector = Vector<T>::kSize;
  const bool whole = v.n % kVector == 0 && v.h % kVector == 0 && v.w % kVector == 0;
  return v.c == 1 && whole && channels % kVector == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

template <typename Math>
InputSource<Math> input_source(const View4<const typename Math::Element>& x, int64_t C) {
  return {narrowed(x), x.c <= x.w, channels_are_vectors(x, C)};
}

// Weight or bias: float, or of the input's type.
struct GemmValues {
  const void* data;
  bool wide;  // float, whatever the input is

  template <typename T>
  __device__ float at(int64_t offset) const {
    return wide ? static_cast<const float*>(data)[offset]
                : static_cast<float>(static_cast<const T*>(data)[offset]);
  }
};

// The weight seen as [columns, channels, kernel_h, kernel_w], with its strides.
struct GemmWeight {
  GemmValues values;
  int64_t column, channel, tap_h, tap_w;
};

// Which of a block's output channels the product's column 8 n + 2 t + e is. Those of a thread, by
// which they are stored, are 8 neighbours in 4 fragments.
__device__ inline int channel_of_column(int column) {
  const int n = column / 8, t = column % 8 / 2, e = column % 2;
  return n / 4 * 32 + 8 * t + n % 4 * 2 + e;
}

// The weights as shared memory has them, `to` [column blocks, chunks, rows, row bytes]: rows are
// [taps, columns]; zeros where there is nothing. One thread per element.
template <typename Math, int kTilesN, bool kFold>
__global__ void __launch_bounds__(kElementThreads)
    pack_weights_kernel(ConvBlockShape s, GemmTile t, GemmWeight weight, typename Math::Element* to,
                        int64_t elements) {
  using Element = typename Math::Element;
  constexpr int kColumns = 8 * kTilesN, kBytes = sizeof(Element);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i >= elements) return;
  const int depth = t.weight_row_bytes / kBytes, block_rows = t.weight_bytes / t.weight_row_bytes;
  const int at = static_cast<int>(i % depth), row = static_cast<int>(i / depth % block_rows);
  const unsigned block = static_cast<unsigned>(i / depth / block_rows), chunks = t.chunks;
  const int64_t k =
      static_cast<int64_t>(block / chunks) * kColumns + channel_of_column(row % kColumns);
  const int tap = row / kColumns, kernel_w = static_cast<int>(s.kernel_w);
  const int y = kFold ? tap : tap / kernel_w, x = kFold ? at / t.channels : tap % kernel_w;
  const int channel = kFold ? at % t.channels : at;
  const int64_t c = static_cast<int64_t>(block % chunks) * t.channels + channel;
  float value = 0;
  if (k < s.K && c < s.C && channel < t.channels && x < kernel_w)
    value = weight.values.at<Element>(k * weight.column + c * weight.channel + y * weight.tap_h +
                                      x * weight.tap_w);
  to[i] = Math::rounded(value);
}

// The block's weights for a chunk of channels.
__device__ inline void load_weights(const GemmTile& t, const unsigned char* packed,
                                    unsigned char* to, int chunk) {
  const unsigned char* from =
      packed + (static_cast<int64_t>(blockIdx.y) * t.chunks + chunk) * t.weight_bytes;
  const int bytes = static_cast<int>(t.weight_bytes);
#pragma unroll 4
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    copy_async(to + i, from + i, false);
}

// ---- multiplying

// `bias` is that of the thread's first channel: see channel_of_column.
template <int kM, int kTilesN>
__device__ void start_sums(const float* bias, float (&sums)[kM][kTilesN][4]) {
#pragma unroll
  for (int n = 0; n < kTilesN; n += 2) {
    const auto four = *reinterpret_cast<const Vector<float>*>(bias + n / 4 * 32 + n % 4 * 2);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int m = 0; m < kM; ++m) sums[m][n + i / 4][i % 4] = four.e[i / 4 * 2 + i % 2];
  }
}

// What was copied as it is becomes what the unit would read, once for all taps.
template <typename Math>
__device__ void round_patch(unsigned char* patch, int bytes) {
#pragma unroll 2
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
    auto& four = *reinterpret_cast<Vector<float>*>(patch + i);
    Vector<float> rounded = four;
#pragma unroll
    for (float& e : rounded.e) e = Math::rounded(e);
    four = rounded;
  }
}

// sums += patch · weights over all taps, on the matrix unit. A step of the sum is 32 bytes of
// channels. Where the kSteps of a tap are known, not 0, loads of one overlap products of another.
template <typename Math, int kTilesN, bool kFold, int kSteps>
__device__ void multiply_taps(const ConvBlockShape& s, const GemmTile& t,
                              const unsigned char* patch, const unsigned char* weights,
                              const int* table, const int* row_offsets,
                              float (&sums)[2 * Layout<Math>::kGroups][kTilesN][4]) {
  constexpr int kM = 2 * Layout<Math>::kGroups, kUnrolled = kSteps ? kSteps : 1;
  // load_matrices wants of lane i row i % 8 of the lower or upper 8 rows, the left or right 16
  // bytes.
  const int lane = threadIdx.x % kWarpSize, half = lane / 8 % 2, piece = lane / 16;
  const int* const own_rows = row_offsets + row_warp() * kM * 16 + half * 8 + lane % 8;
  SharedAddress rows[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) rows[m] = shared_address(patch) + piece * 16 + own_rows[m * 16];
  const int* tap_offsets = table + half * t.taps;
  SharedAddress b_row =
      shared_address(weights) + (lane / 16 * 8 + lane % 8) * t.weight_row_bytes + half * 16;

  const int pair_bytes = 16 * t.weight_row_bytes, steps = kSteps ? kSteps : t.depth_bytes / 32;
  // Beyond a run's end lie other pixels, whose NaN no weight of zero makes harmless.
  const int run_words = static_cast<int>(s.kernel_w) * t.pixel_bytes % 32 / 4;
  const bool cut_left = kFold && run_words > 0 && lane % 4 >= run_words;
  const bool cut_right = kFold && run_words > 0 && lane % 4 + 4 >= run_words;
  int next = tap_offsets[0];
#pragma unroll 1
  for (int tap = 0; tap < t.taps; ++tap, b_row += kTilesN / 2 * pair_bytes) {
    const int offset = next;
    next = tap_offsets[tap + 1 < t.taps ? tap + 1 : tap];  // early: all else waits for it
#pragma unroll kUnrolled
    for (int step = 0; step < steps; ++step) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_matrices(a[m], rows[m] + offset + step * 32);
        if (kFold && step == steps - 1) {
          if (cut_left) a[m][0] = a[m][1] = 0;
          if (cut_right) a[m][2] = a[m][3] = 0;
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_row + n / 2 * pair_bytes + step * 32);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          Math::multiply(sums[m][n], a[m], b[0], b[1]);
          Math::multiply(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

template <typename Math, int kTilesN, bool kFold>
__device__ void multiply_matrices(const ConvBlockShape& s, const GemmTile& t,
                                  const unsigned char* patch, const unsigned char* weights,
                                  const int* table, const int* row_offsets,
                                  float (&sums)[2 * Layout<Math>::kGroups][kTilesN][4]) {
  switch (t.depth_bytes) {
    case 32:
      return multiply_taps<Math, kTilesN, kFold, 1>(s, t, patch, weights, table, row_offsets, sums);
    case 64:
      return multiply_taps<Math, kTilesN, kFold, 2>(s, t, patch, weights, table, row_offsets, sums);
    case 128:
      return multiply_taps<Math, kTilesN, kFold, 4>(s, t, patch, weights, table, row_offsets, sums);
    default:
      return multiply_taps<Math, kTilesN, kFold, 0>(s, t, patch, weights, table, row_offsets, sums);
  }
}

// sums += products of rows and a tap's weights, with multiply-adds.
template <int kM, int kTilesN>
__device__ void multiply_tap(const GemmTile& t, const unsigned char* left,
                             const unsigned char* right, const int (&rows)[kM][2],
                             const unsigned char* b_row, float (&sums)[kM][kTilesN][4]) {
  for (int depth = 0; depth < t.depth_bytes; depth += 16) {
    Vector<float> a[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        a[m][h] = *reinterpret_cast<const Vector<float>*>((h ? right : left) + rows[m][h] + depth);
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto b = *reinterpret_cast<const Vector<float>*>(
            b_row + (8 * n + e) * t.weight_row_bytes + depth);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) sums[m][n][2 * h + e] += a[m][h].e[i] * b.e[i];
      }
  }
}

// multiply_matrices with multiply-adds. A step of the sum is 4 floats, at most a pixel: no run's
// end is cut. A tap of many channels is summed up on its own: with each product the error grows by
// the last bit of the sum that it is added to.
template <typename Math, int kTilesN, bool kFold>
__device__ void multiply_floats(const ConvBlockShape& s, const GemmTile& t,
                                const unsigned char* patch, const unsigned char* weights,
                                const int* table, const int* row_offsets,
                                float (&sums)[2 * Layout<Math>::kGroups][kTilesN][4]) {
  constexpr int kM = 2 * Layout<Math>::kGroups;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4;
  int rows[kM][2];
  for (int m = 0; m < kM; ++m)
    for (int h = 0; h < 2; ++h) rows[m][h] = row_offsets[((row_warp() * kM + m) * 2 + h) * 8 + g];
  const unsigned char* b_row = weights + 2 * (lane % 4) * t.weight_row_bytes;

  const int tap_bytes = 8 * kTilesN * t.weight_row_bytes;
  for (int tap = 0; tap < t.taps; ++tap, b_row += tap_bytes) {
    const unsigned char *left = patch + table[tap], *right = patch + table[t.taps + tap];
    if constexpr (kFold) {
      multiply_tap(t, left, right, rows, b_row, sums);
    } else {
      float tap_sums[kM][kTilesN][4] = {};
      multiply_tap(t, left, right, rows, b_row, tap_sums);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kTilesN; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n][i] += tap_sums[m][n][i];
    }
  }
}

// ---- storing

template <typename T>
struct GemmOutput {
  NarrowView<T> out;
  uint8_t* codes;  // null: none are kept
  bool vectors;    // eight neighbouring channels lie in aligned vectors
};

// The maximum of a window and where it was.
struct Best {
  float value = 0;
  int place = Codes::kNone;

  // By PyTorch's rule: the first in row-major order wins, but every NaN takes over.
  __device__ void offer(float v, int at, bool first) {
    const bool wins = first | (v > value) | (v != v);  // no branches
    value = wins ? v : value, place = wins ? at : place;
  }
  // The same of 2 x 2 positions in fewer steps, if none is NaN. If one is, so is the value.
  __device__ static Best of_square(float v0, float v1, float v2, float v3) {
    const float above = max_nan(v0, v1), below = max_nan(v2, v3);
    const int right_above = v1 > v0 ? 1 : 0, right_below = v3 > v2 ? 3 : 2;
    return {max_nan(above, below), below > above ? right_below : right_above};
  }
  __device__ void close(bool relu) {
    if (relu && value <= 0) value = 0, place = Codes::kNone;
  }
};

constexpr int kRun = 8;  // neighbouring channels of a pixel, which a thread stores in one go

// The last boxes reach beyond the tensor.
__device__ inline bool is_output(const ConvBlockShape& s, int n, int h, int w) {
  return (n < static_cast<int>(s.N)) & (h < static_cast<int>(s.out_h)) &
         (w < static_cast<int>(s.out_w));  // no branches
}

// Where the outputs of one position lie, from channel k0 on.
template <typename T>
struct OutputPixel {
  T* out;
  uint8_t* codes;
  int channels;  // that follow

  __device__ OutputPixel(const ConvBlockShape& s, const GemmOutput<T>& to, int n, int k0, int h,
                         int w)
      : out(to.out.at(n, k0, h, w)), codes(nullptr), channels(static_cast<int>(s.K) - k0) {
    const int out_h = static_cast<int>(s.out_h), out_w = static_cast<int>(s.out_w);
    const int K = static_cast<int>(s.K);
    if (to.codes)
      codes = to.codes + multiply_add_wide(n, out_h * out_w * K, (h * out_w + w) * K + k0);
  }
};

// The codes of four channels side by side: a code is a place's lowest byte.
__device__ inline unsigned packed_codes(const Best (&best)[kRun], int i) {
  static_assert(static_cast<uint8_t>(Codes::kNone) == kShut<uint8_t>);
  return __byte_perm(__byte_perm(best[i].place, best[i + 1].place, 0x0040),
                     __byte_perm(best[i + 2].place, best[i + 3].place, 0x0040), 0x5410);
}

// Channels k0 + k to k0 + k + 7 of the pixel.
template <typename T>
__device__ void store_run(const ConvBlockShape& s, const GemmOutput<T>& to,
                          const OutputPixel<T>& pixel, int k, Best (&best)[kRun]) {
#pragma unroll
  for (Best& b : best) b.close(s.relu);
  if (to.vectors) {
    constexpr int kSize = Vector<T>::kSize;
#pragma unroll
    for (int i = 0; i < kRun; i += kSize) {
      Vector<T> v;
#pragma unroll
      for (int j = 0; j < kSize; ++j) v.e[j] = static_cast<T>(best[i + j].value);
      *reinterpret_cast<Vector<T>*>(pixel.out + k + i) = v;
    }
  } else {
    T* out = pixel.out + static_cast<int64_t>(k) * to.out.c;
#pragma unroll
    for (int i = 0; i < kRun; ++i, out += to.out.c)
      if (k + i < pixel.channels) *out = static_cast<T>(best[i].value);
  }
  if (!pixel.codes) return;
  if (pixel.channels % kRun == 0) {
    *reinterpret_cast<uint2*>(pixel.codes + k) = {packed_codes(best, 0), packed_codes(best, 4)};
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (k + i < pixel.channels) pixel.codes[k + i] = static_cast<uint8_t>(best[i].place);
  }
}

// Every row is an output.
template <int kGroups, int kTilesN, typename T>
__device__ void store_outputs(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                              const Box& box, int k0,
                              const float (&sums)[2 * kGroups][kTilesN][4]) {
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
#pragma unroll
  for (int m = 0; m < 2 * kGroups; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int index = (warp * kGroups * 2 + m) * 16 + half * 8 + g;
      const Unit u = unit_at(t, index);
      const int n = box.n + u.image, h = box.out_h + u.y, w = box.out_w + u.x;
      if (index >= static_cast<int>(t.units) || !is_output(s, n, h, w)) continue;
      const OutputPixel<T> pixel(s, to, n, k0, h, w);
    // With pool padding the one position of a window may lie outside the map: never with a
    // window of 1 x 1, whose padding is at most half of it.
#pragma unroll
      for (int tile = 0; tile < kTilesN; tile += kRun / 2) {
        if (8 * tile >= pixel.channels) break;
        Best best[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) best[i] = {sums[m][tile + i / 2][2 * half + i % 2], 0};
        store_run(s, to, pixel, 8 * tile, best);
      }
    }
}

// Four rows of a thread are a window.
template <int kGroups, int kTilesN, typename T>
__device__ void store_windows(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                              const Box& box, int k0,
                              const float (&sums)[2 * kGroups][kTilesN][4]) {
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
  const int conv_h = static_cast<int>(s.conv_h), conv_w = static_cast<int>(s.conv_w);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int index = (warp * kGroups + group) * 8 + g;
    const Unit u = unit_at(t, index);
    const int n = box.n + u.image, h = box.out_h + u.y, w = box.out_w + u.x;
    if (index >= static_cast<int>(t.units) || !is_output(s, n, h, w)) continue;
    const OutputPixel<T> pixel(s, to, n, k0, h, w);
    const int ch = box.conv_h + u.y * static_cast<int>(s.pool_stride_h);
    const int cw = box.conv_w + u.x * static_cast<int>(s.pool_stride_w);
    const bool whole = ch >= 0 && ch + 1 < conv_h && cw >= 0 && cw + 1 < conv_w;
#pragma unroll
    for (int tile = 0; tile < kTilesN; tile += kRun / 2) {
      if (8 * tile >= pixel.channels) break;
      const auto value = [&](int i, int place) {
        return sums[2 * group + place / 2][tile + i / 2][2 * (place % 2) + i % 2];
      };
      Best best[kRun];
      bool exact = !whole;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        best[i] = Best::of_square(value(i, 0), value(i, 1), value(i, 2), value(i, 3));
        exact |= best[i].value != best[i].value;
      }
      if (exact) {
        bool first = true;
#pragma unroll
        for (int place = 0; place < 4; ++place) {
          const int y = ch + place / 2, x = cw + place % 2;
          if (y < 0 || y >= conv_h || x < 0 || x >= conv_w) continue;
#pragma unroll
          for (int i = 0; i < kRun; ++i) best[i].offer(value(i, place), place, first);
          first = false;
        }
      }
      store_run(s, to, pixel, 8 * tile, best);
    }
  }
}

// Rows are positions of the conv map; they are pooled from shared memory, `map`
// [rows, columns + 1] floats.
template <int kGroups, int kTilesN, typename T>
__device__ void store_pooled(const ConvBlockShape& s, const GemmTile& t, const GemmOutput<T>& to,
                             const Box& box, int column0, float* map,
                             const float (&sums)[2 * kGroups][kTilesN][4]) {
  constexpr int kColumns = 8 * kTilesN, kRow = kColumns + 1, kRuns = kColumns / kRun;
  const int warp = row_warp(), g = threadIdx.x % kWarpSize / 4;
  if (warp * kGroups * 32 < t.units)
#pragma unroll
    for (int m = 0; m < 2 * kGroups; ++m)
#pragma unroll
      for (int tile = 0; tile < kTilesN; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          map[((warp * kGroups * 2 + m) * 16 + i / 2 * 8 + g) * kRow +
              channel_of_column(8 * tile + 2 * (threadIdx.x % 4) + i % 2)] = sums[m][tile][i];
  __syncthreads();
  const int outputs = t.images * t.box_h * t.box_w;
  for (int i = threadIdx.x; i < outputs * kRuns; i += blockDim.x) {
    const int column = i % kRuns * kRun, index = i / kRuns;
    const int y = index / t.box_w % t.box_h, x = index % t.box_w, image = index / t.box_w / t.box_h;
    const int n = box.n + image, h = box.out_h + y, w = box.out_w + x;
    if (!is_output(s, n, h, w) || column0 + column >= static_cast<int>(s.K)) continue;
    const int dy = y * static_cast<int>(s.pool_stride_h),
              dx = x * static_cast<int>(s.pool_stride_w);
    Best best[kRun];
    bool first = true;
    for (int py = 0; py < s.pool_h; ++py) {
      if (box.conv_h + dy + py < 0 || box.conv_h + dy + py >= s.conv_h) continue;
      for (int px = 0; px < s.pool_w; ++px) {
        if (box.conv_w + dx + px < 0 || box.conv_w + dx + px >= s.conv_w) continue;
        const float* row = map + ((image * t.unit_h + dy + py) * t.unit_w + dx + px) * kRow;
#pragma unroll
        for (int j = 0; j < kRun; ++j)
          best[j].offer(row[column + j], py * static_cast<int>(s.pool_w) + px, first);
        first = false;
      }
    }
    store_run(s, to, OutputPixel<T>(s, to, n, column0 + column, h, w), 0, best);
  }
}

// ---- the kernel

// Blocks that shall fit on a multiprocessor side by side: a folded patch leaves shared memory for a
// third one.
template <typename Math, int kTilesN, bool kFold>
constexpr int gemm_blocks() {
  return kFold && kTilesN == 4 && sizeof(typename Math::Element) == 2 ? 3 : 2;
}

// Grid: x shares out the boxes, y the output channels. Shared memory: weights, two patches, the map
// to pool, bias, tables of taps, rows and, for the input, the patch's pixels.
template <typename Math, int kTilesN, bool kFold, typename Source>
__global__ void __launch_bounds__(Layout<Math>::kThreads, gemm_blocks<Math, kTilesN, kFold>())
    gemm_kernel(ConvBlockShape s, GemmTile t, Source source, const unsigned char* packed,
                GemmValues bias, GemmOutput<typename Math::Element> to) {
  constexpr int kColumns = 8 * kTilesN, kM = 2 * Layout<Math>::kGroups;
  if constexpr (Layout<Math>::kMatrixUnit && !FASTCLS_SM80) return trap();
  DYNAMIC_SHARED(shared);
  unsigned char* const weights = shared;
  unsigned char* const patches = weights + t.weight_bytes;
  float* const map = reinterpret_cast<float*>(patches + 2 * t.patch_bytes);
  float* const first = reinterpret_cast<float*>(patches + 2 * t.patch_bytes + t.map_bytes);
  int* const table = reinterpret_cast<int*>(first + kColumns);
  int* const row_offsets = table + t.table_entries;
  constexpr int kRows = Layout<Math>::kConfig.rows();
  PatchEntry* const pixels =
      reinterpret_cast<PatchEntry*>(shared + static_cast<int>(t.shared_bytes)) - t.pixels;
  const int column0 = blockIdx.y * kColumns;

  // 1. What stays the same for all boxes.
  fill_table<kFold>(s, t, table);
  for (int row = threadIdx.x; row < kRows; row += blockDim.x)
    row_offsets[row] = row_offset<kFold>(s, t, row);
  if constexpr (!Source::kRounded) {
    source.fill_table(t, pixels);
    __syncthreads();
  }
  for (int k = threadIdx.x; k < kColumns; k += blockDim.x)
    first[k] = bias.data && column0 + k < s.K ? bias.at<typename Math::Element>(column0 + k) : 0.0f;

  // 2. While one patch is multiplied the next is loaded; the first is only loaded: the code for it
  // is long, and is there once. Weights of several chunks are on their way meanwhile; a single
  // chunk's stay.
  const int boxes = static_cast<int>(t.boxes);
  int box_index = blockIdx.x, chunk = -1, slot = 1;  // nothing to multiply yet
  float sums[kM][kTilesN][4];
#pragma unroll 1
  while (true) {
    const bool first_stage = box_index == static_cast<int>(blockIdx.x) && chunk == 0;
    if (chunk < 0 || (t.chunks > 1 && !first_stage))
      load_weights(t, packed, weights, chunk < 0 ? 0 : chunk);
    copy_async_commit();
    const int next_chunk = chunk + 1 == t.chunks ? 0 : chunk + 1;
    const int step = chunk >= 0 && next_chunk == 0 ? static_cast<int>(gridDim.x) : 0;
    const int next_index = box_index + step;
    if (next_index < boxes) {
      const Box box = box_at(s, t, next_index);
      unsigned char* const next = patches + (slot ^ 1) * t.patch_bytes;
      if constexpr (Source::kRounded)  // a gradient is expanded, window by window
        source.load_patch(s, t, next, box, next_chunk);
      else if constexpr (kFold)
        source.load_folded(s, t, pixels, next, box);
      else
        source.load_patch(s, t, pixels, next, box, next_chunk);
    }
    copy_async_commit();
    if (chunk >= 0) {
      unsigned char* const patch = patches + slot * t.patch_bytes;
      copy_async_wait<1>();
      __syncthreads();
      if constexpr (Math::kArithmetic == Arithmetic::kTf32 && !Source::kRounded) {
        round_patch<Math>(patch, t.patch_bytes);
        __syncthreads();
      }

      // 3. Bias is the sums' first value, so that windows are compared as PyTorch compares them.
      if (chunk == 0) start_sums(first + kRun * (threadIdx.x % 4), sums);
      const int rows_used = static_cast<int>(t.units) * (t.pooling == Pooling::kWindow ? 4 : 1);
      if (row_warp() * Layout<Math>::kGroups * 32 < rows_used) {
        if constexpr (!Layout<Math>::kMatrixUnit)
          multiply_floats<Math, kTilesN, kFold>(s, t, patch, weights, table, row_offsets, sums);
        else
          multiply_matrices<Math, kTilesN, kFold>(s, t, patch, weights, table, row_offsets, sums);
      }

      // 4. The outputs of the box.
      if (chunk == t.chunks - 1) {
        const Box box = box_at(s, t, box_index);
        const int k0 = column0 + kRun * static_cast<int>(threadIdx.x % 4);
        if (Source::kRounded || t.pooling == Pooling::kNone)  // dX has no pool
          store_outputs<Layout<Math>::kGroups, kTilesN>(s, t, to, box, k0, sums);
        else if (kTilesN > 4 || t.pooling == Pooling::kWindow)  // see gemm_plan
          store_windows<Layout<Math>::kGroups, kTilesN>(s, t, to, box, k0, sums);
        else
          store_pooled<Layout<Math>::kGroups, kTilesN>(s, t, to, box, column0, map, sums);
      }
      __syncthreads();  // patch and weights are free, and the map
    }
    if (next_index >= boxes) break;
    box_index = next_index, chunk = next_chunk, slot ^= 1;
  }
  copy_async_wait<0>();
}

// ---- launching

// Packs the weights, then persistent blocks: as many as a multiprocessor has room for. The packed
// weights lie where `like` does.
template <typename Math, int kTilesN, bool kFold, typename Source>
void launch_gemm(const Launcher& launch, const ConvBlockShape& s, const GemmTile& t,
                 const Source& source, const GemmWeight& weight, const void* bias,
                 const GemmOutput<typename Math::Element>& to, const Tensor& like) {
  using Element = typename Math::Element;
  const int64_t columns = ceil_div(s.K, 8 * kTilesN);
  const Tensor packed = empty_flat({columns * t.chunks * t.weight_bytes}, ScalarType::Byte, like);
  const int64_t elements = packed.numel() / static_cast<int64_t>(sizeof(Element));
  launch(pack_weights_kernel<Math, kTilesN, kFold>, dim3(element_blocks(elements)), kElementThreads,
         s, t, weight, static_cast<Element*>(packed.mutable_data_ptr()), elements);

  // Each block takes another KiB.
  const int64_t room = launch.max_shared_bytes() / (t.shared_bytes + 1024);
  const int64_t blocks = std::clamp<int64_t>(room, 1, gemm_blocks<Math, kTilesN, kFold>());
  const int64_t at_once = std::max<int64_t>(blocks * launch.multiprocessors() / columns, 1);
  const int64_t turns = ceil_div(t.boxes, at_once);
  launch.with_shared(t.shared_bytes, gemm_kernel<Math, kTilesN, kFold, Source>,
                     dim3(ceil_div(t.boxes, turns), columns), Layout<Math>::kThreads, s, t, source,
                     static_cast<const unsigned char*>(packed.const_data_ptr()),
                     GemmValues{bias, weight.values.wide}, to);
}

template <typename T>
GemmOutput<T> gemm_output(const Tensor& out, const Codes& codes, int64_t channels) {
  const auto view = mutable_view<T>(out);
  return {narrowed(view), static_cast<uint8_t*>(codes.data),
          channels % kRun == 0 && channels_are_vectors(view, channels)};
}

}  // namespace fastcls::cuda
