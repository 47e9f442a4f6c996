// The patch of the input under a box of outputs, in shared memory, as the matrix products of the
// conv block read it: arithmetics, places and loads that the forward pass, dX and dW share.
// GemmTile in tiles.h says how it is laid out.
#pragma once

#include "conv_block.h"
#include "cuda/common.h"
#include "cuda/conv_block_kernels.h"
#include "cuda/tiles.h"

namespace fastcls::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// ---- arithmetic

// Channels side by side, 16 bytes of them.
template <typename Element, int kCount = 16 / sizeof(Element)>
struct alignas(kCount * sizeof(Element)) Vector {
  static constexpr int kSize = kCount;
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

// A float is the sum of two tf32 but for its last bit at most. Their products without that of the
// two small parts come to a product of floats but for some 2^-22 of it, about what the sums are
// rounded by; each 8 of them are summed on their own, since the unit cuts off its sums' last bits.
struct Tf32x3Math {
  using Element = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::kTf32x3;
  __device__ static Element rounded(float x) { return x; }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = high_part(a[i]), low[i] = low_part(a[i]);
    const uint32_t high0 = high_part(b0), high1 = high_part(b1);
    float sums[4] = {};
    mma_tf32(sums, low, high0, high1);
    mma_tf32(sums, high, low_part(b0), low_part(b1));
    mma_tf32(sums, high, high0, high1);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += sums[i];
  }

 private:
  // The nearest tf32 that is finite: the low part of an infinity is infinite, and no infinity meets
  // a low part of zero.
  __device__ static uint32_t high_part(uint32_t bits) {
    constexpr float kLargest = 0x1.ffcp127f;
    const float finite = fminf(fmaxf(float_of_bits(bits), -kLargest), kLargest);
    return (bits_of_float(finite) + 0x1000) & 0xffffe000;
  }
  __device__ static uint32_t low_part(uint32_t bits) {
    return bits_of_float(float_of_bits(bits) - float_of_bits(high_part(bits)));
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
  // Multiply-adds of floats are for devices whose matrix unit does not read tf32.
  static constexpr bool kRuns = runs_kernels(kMatrixUnit, arch_has(Math::kArithmetic, 75));
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
    case Arithmetic::kTf32x3:
      return f(Tf32x3Math{});
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
  if (t.copy_bytes) return (x & -t.copies) * t.pixel_bytes + (x & (t.copies - 1)) * t.copy_bytes;
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
  const int along = kFold ? column_offset(t, u.x * t.step_w + right) : u.x * t.pixel_bytes;
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

// An output of the box: elements from the box's first output to it, codes to its codes, and how far
// from the first it is. The same for all boxes.
struct alignas(kPatchEntryBytes) OutputEntry {
  int to, code, y_x, image;  // image -1: there is none
  __device__ int y() const { return y_x & 0xffff; }
  __device__ int x() const { return y_x >> 16; }
};

// Of the box's outputs in their order; `entries` may be more than there are.
template <typename T>
__device__ void fill_outputs(const ConvBlockShape& s, const GemmTile& t, const NarrowView<T>& view,
                             int entries, OutputEntry* table) {
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    const int x = i % t.box_w, y = i / t.box_w % t.box_h, image = i / t.box_w / t.box_h;
    const int row = image * static_cast<int>(s.out_h) + y;
    const int code = (row * static_cast<int>(s.out_w) + x) * static_cast<int>(s.K);
    table[i] = {image * view.n + y * view.h + x * view.w, code, x << 16 | y,
                i < t.outputs ? image : -1};
  }
}

// Does the pixel lie in a tensor [N, ., H, W], and not in its padding?
__device__ inline bool is_inside(const ConvBlockShape& s, const Box& box, const PatchEntry& pixel) {
  return (static_cast<unsigned>(box.h + pixel.y()) < static_cast<unsigned>(s.H)) &
         (static_cast<unsigned>(box.w + pixel.x()) < static_cast<unsigned>(s.W)) &
         (box.n + pixel.image < static_cast<int>(s.N));  // no branches
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
    for (int i = threadIdx.x; i < t.table_pixels; i += blockDim.x) table[i] = entry(t, i);
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

  // kHasTable: known before the launch, see GemmTile's table_pixels.
  template <bool kHasTable>
  __device__ void load_folded(const ConvBlockShape& s, const GemmTile& t, const PatchEntry* table,
                              unsigned char* patch, const Box& box) const {
    if (t.channels == 8)
      load_folded<kHasTable, 8, 8>(s, t, table, patch, box);
    else if (t.channels == 1)
      load_folded<kHasTable, 1, 1>(s, t, table, patch, box);
    else if (s.C == 1)
      load_folded<kHasTable, 4, 1>(s, t, table, patch, box);
    else
      load_folded<kHasTable, 4, 4>(s, t, table, patch, box);
  }

 private:
  __device__ static Element operand(Element e) {
    if constexpr (sizeof(Element) == 2) return e;
    return Math::rounded(e);
  }

  __device__ PatchEntry entry(const GemmTile& t, unsigned i) const {
    PatchEntry pixel = patch_entry(t, i);
    pixel.from = pixel.image * x.n + pixel.y() * x.h + pixel.x() * x.w;
    return pixel;
  }

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

  // A folded patch of kChannels to a pixel, of which up to kRead are there, several pixels at a
  // time, for their channels have to pass through registers, where they are rounded.
  template <bool kHasTable, int kChannels, int kRead>
  __device__ void load_folded(const ConvBlockShape& s, const GemmTile& t, const PatchEntry* table,
                              unsigned char* patch, const Box& box) const {
    constexpr int kBytes = kChannels * sizeof(Element), kAtOnce = kBytes <= 16 ? 2 : 1;
    struct alignas(kBytes < 16 ? kBytes : 16) Pixel {
      Element e[kChannels];
    };
    const int64_t origin = first_pixel(box) * static_cast<int64_t>(sizeof(Element));
    const char* const data = reinterpret_cast<const char*>(x.data);
    const unsigned pixels = t.pixels;
    const int channels = static_cast<int>(s.C);
#pragma unroll 1
    for (unsigned first = threadIdx.x; first < pixels; first += kAtOnce * blockDim.x) {
      Pixel values[kAtOnce];
      int to[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned item = first + i * blockDim.x;
        const unsigned known = item < pixels ? item : 0;
        const PatchEntry pixel = kHasTable || t.table_pixels ? table[known] : entry(t, known);
        const bool inside = is_inside(s, box, pixel);
        const auto* from = reinterpret_cast<const Element*>(
            data + multiply_add_wide(pixel.from, sizeof(Element), origin));
        to[i] = pixel.to;
#pragma unroll
        for (int c = 0; c < kChannels; ++c, from += x.c)
          values[i].e[c] = c < kRead && inside && (kRead == 1 || c < channels)
                               ? operand(*from)
                               : Math::rounded(0.0f);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * blockDim.x >= pixels) break;
        *reinterpret_cast<Pixel*>(patch + to[i]) = values[i];
        // Copy c has column x where the first one has column x - c. Columns before c come to lie
        // where nobody reads: in the last ones of the row before, or in the room between copies.
        if (kBytes < 16 && t.copy_bytes)
#pragma unroll
          for (int c = 1; c < 16 / kBytes; ++c)
            *reinterpret_cast<Pixel*>(patch + to[i] + c * (t.copy_bytes - kBytes)) = values[i];
      }
    }
  }
};

// A tensor whose channels lie in aligned vectors of `size`.
template <typename T>
bool channels_are_vectors(const View4<T>& v, int64_t channels, int64_t size = Vector<T>::kSize) {
  const bool whole = v.n % size == 0 && v.h % size == 0 && v.w % size == 0;
  return v.c == 1 && whole && channels % size == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % (size * sizeof(T)) == 0;
}

template <typename Math>
InputSource<Math> input_source(const View4<const typename Math::Element>& x, int64_t C) {
  return {narrowed(x), x.c <= x.w, channels_are_vectors(x, C)};
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

}  // namespace fastcls::cuda
