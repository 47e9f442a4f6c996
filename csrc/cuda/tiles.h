// Shape → launch configuration, as pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "shapes.h"

namespace fastcls::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One thread per element: 4 warps a block, so that the last block wastes little and a
// multiprocessor still holds all its threads within 16 blocks. A grid has at most 2^31 - 1 blocks
// along x, which is more elements than any device's memory holds.
constexpr int kElementThreads = 128;

constexpr int64_t element_blocks(int64_t elements) { return ceil_div(elements, kElementThreads); }

// The weight gradient of a conv block. One channel's gradient is a row of `elements`: its
// taps × C / groups weights, then its bias. A block owns `lanes` elements of one channel and one
// chunk of the pooled rows; its threads form a [rows, lanes] grid whose rows take turns at the
// pooled rows and are summed at the end.
constexpr int64_t weight_grad_elements(const ConvBlockShape& s) {
  return s.kernel_h * s.kernel_w * s.group_in() + 1;
}

struct WeightGradTile {
  int64_t elements;  // per output channel
  int lanes, rows;   // powers of two, lanes * rows == kElementThreads
  int64_t tiles;     // tiles of `lanes` elements per output channel
  int64_t chunks;    // parts of the N * out_h pooled rows
  int64_t rows_per_chunk;
};

constexpr WeightGradTile weight_grad_tile(const ConvBlockShape& s) {
  // Some 2000 blocks of 128 threads fill the largest devices (132 multiprocessors, 2048 threads
  // each). The number depends on the shape alone, so that the sums are the same on every device.
  constexpr int64_t kBlocks = 2048;
  WeightGradTile t{};
  t.elements = weight_grad_elements(s);
  t.lanes = kElementThreads;
  while (t.lanes / 2 >= t.elements) t.lanes /= 2;
  t.rows = kElementThreads / t.lanes;
  t.tiles = ceil_div(t.elements, t.lanes);
  const int64_t pooled_rows = std::max<int64_t>(s.N * s.out_h, 1);
  const int64_t wanted = std::max<int64_t>(kBlocks / (s.K * t.tiles), 1);
  // At least 4 pooled rows for each thread, so that the tree over the block's rows costs little.
  t.rows_per_chunk = std::max<int64_t>(ceil_div(pooled_rows, wanted), 4 * t.rows);
  t.chunks = ceil_div(pooled_rows, t.rows_per_chunk);
  return t;
}

// ---- conv_block as a matrix product: rows are positions of the conv map, columns output channels,
// and the sum runs over taps and input channels (see conv_block_gemm.h).

// Division by a number that is known before the launch: a product's upper half. Exact for
// n * divisor < 2^32.
struct Divider {
  unsigned divisor = 1, reciprocal = 0;  // 2^32 / divisor rounded up; 0 for 1

  constexpr Divider() = default;
  constexpr explicit Divider(int64_t d)
      : divisor(static_cast<unsigned>(d)),
        reciprocal(d == 1 ? 0 : static_cast<unsigned>(((int64_t{1} << 32) + d - 1) / d)) {}
};

// Operands of the product: 16-bit ones or tf32 on the matrix unit, float with multiply-adds.
enum class Arithmetic { kBf16, kF16, kTf32, kFloat };

// What a kernel is compiled for.
struct GemmConfig {
  int element_bytes;  // of an operand in shared memory
  bool matrix_unit;   // else float multiply-adds
  bool gather;        // few input channels: the sum runs over taps x channels in one, unpadded
  int columns;        // output channels of a block
  int warps, groups;  // a warp has `groups` times 32 rows
  bool weight_grad;   // the sum runs over the rows: see WeightGradPlan

  constexpr int rows() const { return 32 * warps * groups; }
  // Channels come in steps of 32 bytes, one fragment of the matrix unit or 8 columns of dW, or of
  // one vector of floats.
  constexpr int step() const { return (matrix_unit || weight_grad ? 32 : 16) / element_bytes; }
};

// 256 rows to a block. On the matrix unit a thread has 4 rows by 8 or 16 columns: 16 products of
// fragments for 6 loads of 4. With multiply-adds it has 8 by 8: 256 of them for 16 loads of 4
// floats, which leaves them, not shared memory, as the limit.
constexpr GemmConfig gemm_config(Arithmetic a, bool gather, int columns) {
  const bool matrix_unit = a != Arithmetic::kFloat;
  const int bytes = a == Arithmetic::kBf16 || a == Arithmetic::kF16 ? 2 : 4;
  return {bytes, matrix_unit, gather, columns, matrix_unit ? 8 : 4, matrix_unit ? 1 : 2, false};
}

// How the rows of the product are numbered. 32 rows are one output each; or the 4 positions of 8
// windows of 2 x 2, so that one thread holds a window's positions in registers; or the positions of
// a box of the conv map, which is pooled in shared memory.
enum class Pooling { kNone, kWindow, kShared };

// A block computes a box of images x box_h x box_w outputs at a time, from the patch of the input
// under it, of which `channels` lie in shared memory at a time. Sizes in bytes are those of shared
// memory: a patch's pixel is its channels and 16 bytes, an odd number of 16-byte pieces, so that 8
// pixels in a row lie in different banks. Where neighbouring rows of the product are `interleave`
// columns of the input apart, these columns lie next to each other: column x at
// x % interleave * run + x / interleave.
struct GemmTile {
  Pooling pooling;
  int images, box_h, box_w;
  int64_t units;
  int unit_h, unit_w;          // what rows stand for: outputs, windows or positions of the box
  int boxes_h, boxes_w;        // boxes along an image's outputs
  int64_t boxes;               // in all
  int taps, channels, chunks;  // chunks of `channels` make up all of them
  int depth_bytes;             // of the sum over one tap: channels; with gather over all taps
  int patch_h, patch_w, interleave, run;
  int pixel_bytes, row_bytes, image_bytes, patch_bytes;
  int step_h, step_bytes;  // between neighbouring units: rows of the input, bytes along one
  int weight_row_bytes, map_row_bytes, map_bytes;
  int64_t weight_bytes, table_entries;
  int64_t shared_bytes;
  Divider by_unit_w, by_unit_h, by_patch_w, by_patch_h, by_interleave, by_vectors;
};

// The product for dW: 32 output channels by up to 72 units of 8 columns, (tap, channel) pairs; a
// warp holds 9 units in 72 registers a thread: one for each tap of a 3 x 3 kernel.
constexpr int kGradChannels = 32, kGradUnits = 9;
// What its blocks add up at the end: a warp's sums, for up to 4 warps, or a vector per thread.
constexpr int kWeightGradFloats = 4 * 2 * kGradUnits * 4 * 32;

// A position's gradients in shared memory: an odd number of 16-byte pieces, or 40 words.
constexpr int grad_row_bytes(const GemmConfig& c) {
  return kGradChannels * c.element_bytes + (c.element_bytes == 2 ? 16 : 32);
}

// Units of 8 columns; with gather the pairs follow each other without padding.
constexpr int64_t grad_units(const GemmConfig& c, int64_t taps, int64_t channels) {
  return c.gather ? ceil_div(taps * channels, 8) : taps * channels / 8;
}

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The tile with this box; shared_bytes says whether it fits.
constexpr GemmTile gemm_tile_of(const ConvBlockShape& s, const GemmConfig& c, int64_t channels,
                                int64_t images, int64_t box_h, int64_t box_w) {
  GemmTile t{};
  const bool square = s.pool_h == 2 && s.pool_w == 2;
  t.pooling = s.window() == 1 ? Pooling::kNone : square ? Pooling::kWindow : Pooling::kShared;
  const int64_t taps = s.kernel_h * s.kernel_w;
  const bool positions = t.pooling == Pooling::kShared;
  const int64_t conv_h = (box_h - 1) * s.pool_stride_h + s.pool_h;
  const int64_t conv_w = (box_w - 1) * s.pool_stride_w + s.pool_w;
  t.images = images, t.box_h = box_h, t.box_w = box_w;
  t.unit_h = positions ? conv_h : box_h, t.unit_w = positions ? conv_w : box_w;
  t.units = images * (positions ? conv_h * conv_w : box_h * box_w);
  t.boxes_h = ceil_div(s.out_h, box_h), t.boxes_w = ceil_div(s.out_w, box_w);
  t.boxes = ceil_div(s.N, images) * t.boxes_h * t.boxes_w;
  t.taps = taps, t.channels = channels;
  t.chunks = ceil_div(s.C, channels);
  const int64_t depth = c.gather ? round_up(taps * s.C, c.step()) : channels;
  t.depth_bytes = depth * c.element_bytes;

  t.patch_h = (conv_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  t.patch_w = (conv_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  const int64_t step_w = s.stride_w * (positions ? 1 : s.pool_stride_w);
  t.step_h = s.stride_h * (positions ? 1 : s.pool_stride_h);
  t.interleave = c.gather ? 1 : step_w;
  t.run = ceil_div(t.patch_w, t.interleave);
  // dW reads pixels of floats word by word: with 8 words more, 4 pixels by 8 channels have a bank
  // each.
  const int64_t apart = c.weight_grad && c.element_bytes == 4 ? 32 : 16;
  t.pixel_bytes = channels * c.element_bytes + (c.gather ? 0 : apart);
  t.step_bytes = t.pixel_bytes * (c.gather ? step_w : 1);
  t.row_bytes = t.interleave * t.run * t.pixel_bytes;
  t.image_bytes = t.patch_h * t.row_bytes;
  const int64_t patch_bytes = round_up(images * t.patch_h * t.row_bytes, 16);
  t.patch_bytes = patch_bytes;

  t.weight_row_bytes = t.depth_bytes + 16;
  t.weight_bytes = c.columns * (c.gather ? 1 : taps) * (depth * c.element_bytes + 16);
  t.map_row_bytes = 4 * (c.columns + 1);  // an odd number of words: a column's rows in other banks
  t.map_bytes = positions ? round_up(c.rows() * t.map_row_bytes, 16) : 0;
  t.table_entries = c.gather ? depth : 2 * taps;
  t.shared_bytes = t.weight_bytes + 2 * patch_bytes + t.map_bytes +
                   round_up(4 * (t.table_entries + c.columns), 16);
  if (c.weight_grad)
    t.shared_bytes = 2 * patch_bytes + c.rows() * (grad_row_bytes(c) + 4) + 4 * kWeightGradFloats;
  t.by_unit_w = Divider(t.unit_w), t.by_unit_h = Divider(t.unit_h);
  t.by_patch_w = Divider(t.patch_w), t.by_patch_h = Divider(t.patch_h);
  t.by_interleave = Divider(t.interleave);
  t.by_vectors = Divider(c.gather ? 1 : channels * c.element_bytes / 16);
  return t;
}

// The largest box of this width that fits, as many images as there is room for; units = 0: none.
constexpr GemmTile gemm_tile_of_width(const ConvBlockShape& s, const GemmConfig& c,
                                      int64_t channels, int64_t box_w, int64_t max_shared) {
  const auto fits = [&](const GemmTile& t) {
    const int capacity = t.pooling == Pooling::kWindow ? c.rows() / 4 : c.rows();
    if (c.weight_grad && grad_units(c, t.taps, t.channels) > kGradUnits * c.warps) return false;
    return t.units <= capacity && t.shared_bytes <= max_shared;
  };
  int64_t box_h = std::min<int64_t>(s.out_h, c.rows() / box_w);
  while (box_h > 0 && !fits(gemm_tile_of(s, c, channels, 1, box_h, box_w))) --box_h;
  if (box_h <= 0) return {};
  box_h = ceil_div(s.out_h, ceil_div(s.out_h, box_h));  // boxes of equal height
  int64_t images = 1;
  if (box_h == s.out_h && box_w == s.out_w) {
    images = std::max<int64_t>(1, std::min<int64_t>(s.N, c.rows() / (box_h * box_w)));
    // Rather fewer of them than to leave multiprocessors of the largest devices without a box.
    constexpr int64_t kBlocks = 264;
    if (!c.weight_grad)
      images = std::clamp<int64_t>(ceil_div(s.N * ceil_div(s.K, c.columns), kBlocks), 1, images);
    while (!fits(gemm_tile_of(s, c, channels, images, box_h, box_w))) --images;
  }
  return gemm_tile_of(s, c, channels, images, box_h, box_w);
}

// The tile with the least work over all boxes; units = 0 where none fits. Work is counted in rows
// of the product: those of the box, useful or not; a pixel of the patch, which is loaded once for
// all taps, as half a row; and the block's weights where they have to be loaded anew for each box:
// they take some 7 instructions per element and thread, as long as 448 rows on the matrix unit, or
// 8 rows of multiply-adds.
constexpr GemmTile gemm_tile(const ConvBlockShape& s, const GemmConfig& c, int64_t max_shared) {
  GemmTile best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  const int64_t all = c.gather ? s.C : round_up(s.C, c.step());
  const int64_t reload = c.weight_grad ? 0 : c.matrix_unit ? 96 : 8;
  for (int64_t channels = all; channels > 0;) {
    for (int64_t splits = 1; splits <= std::min<int64_t>(s.out_w, 16); ++splits) {
      const int64_t box_w = ceil_div(s.out_w, splits);
      const GemmTile t = gemm_tile_of_width(s, c, channels, box_w, max_shared);
      if (t.units == 0) continue;
      const int64_t work =
          t.boxes * (c.rows() + t.images * t.patch_h * t.patch_w / 2 + (t.chunks > 1 ? reload : 0));
      if (work < least) least = work, best = t;
    }
    if (c.gather || channels == c.step()) break;
    channels = round_up(channels / 2, c.step());
  }
  return best;
}

// Sizes that the kernels hold in 32 bits, and no groups.
constexpr bool gemm_serves(const ConvBlockShape& s) {
  constexpr int64_t kMost = 1 << 24;
  const int64_t sizes[] = {s.C,
                           s.K,
                           s.H,
                           s.W,
                           s.conv_h,
                           s.conv_w,
                           s.kernel_h * s.kernel_w,
                           s.pad_h,
                           s.pad_w,
                           s.dilation_h * s.kernel_h,
                           s.dilation_w * s.kernel_w,
                           s.stride_h * s.pool_stride_h,
                           s.stride_w * s.pool_stride_w};
  for (int64_t size : sizes)
    if (size >= kMost) return false;
  return s.groups == 1 && !s.wide_winner();
}

// The matrix unit reads tf32 and bfloat16 from compute capability 8.0 on.
constexpr bool arch_has(Arithmetic a, int arch) { return a == Arithmetic::kFloat || arch >= 80; }

struct GemmPlan {
  GemmConfig config;
  GemmTile tile;  // units = 0: there is none, the general kernels serve
  constexpr bool exists() const { return tile.units > 0; }
};

// How the matrix-product kernels would compute this block. `max_shared` is what a block may ask
// for: with 160 KiB and more two blocks shall fit on a multiprocessor.
constexpr GemmPlan gemm_plan(const ConvBlockShape& s, Arithmetic a, bool gather, int most_columns,
                             int arch, int64_t max_shared) {
  if (!arch_has(a, arch) || !gemm_serves(s)) return {};
  constexpr int64_t kForTwo = 160 << 10;
  for (int64_t shared : {max_shared >= kForTwo ? max_shared / 2 : max_shared, max_shared})
    for (int columns : {64, 32}) {
      if (columns > most_columns || (columns == 64 && (s.K <= 32 || a == Arithmetic::kFloat)))
        continue;
      const GemmConfig c = gemm_config(a, gather, columns);
      const GemmTile t = gemm_tile(s, c, shared);
      if (t.units > 0 && t.boxes * t.chunks < std::numeric_limits<int32_t>::max()) return {c, t};
    }
  return {};
}

// dX is the convolution of the conv map's gradient, as wide as the map, with the weight mirrored
// and its channels exchanged. For convolutions without a stride.
constexpr ConvBlockShape transposed(const ConvBlockShape& s) {
  ConvBlockShape t = s;
  t.C = s.K, t.H = s.conv_h, t.W = s.conv_w, t.K = s.C;
  t.pad_h = s.dilation_h * (s.kernel_h - 1) - s.pad_h;
  t.pad_w = s.dilation_w * (s.kernel_w - 1) - s.pad_w;
  t.conv_h = t.out_h = s.H, t.conv_w = t.out_w = s.W;
  t.pool_h = t.pool_w = t.pool_stride_h = t.pool_stride_w = 1, t.pool_pad_h = t.pool_pad_w = 0;
  t.relu = false;
  return t;
}

// The conv map as far as windows reach: rows of the product for dW.
constexpr ConvBlockShape map_shape(const ConvBlockShape& s) {
  ConvBlockShape t = s;
  t.out_h = std::min((s.out_h - 1) * s.pool_stride_h + s.pool_h - s.pool_pad_h, s.conv_h);
  t.out_w = std::min((s.out_w - 1) * s.pool_stride_w + s.pool_w - s.pool_pad_w, s.conv_w);
  t.pool_h = t.pool_w = t.pool_stride_h = t.pool_stride_w = 1, t.pool_pad_h = t.pool_pad_w = 0;
  return t;
}

// dW and db: a block owns 32 output channels and a chunk of the input's channels, and goes over
// every `splits`-th part of the boxes. Its warps are warps_n for the units times warps_k that take
// turns at the positions.
struct WeightGradPlan {
  GemmConfig config;
  GemmTile tile;
  int units, warps_n, warps_k;
  int64_t channel_blocks, splits;
  constexpr bool exists() const { return tile.units > 0; }
};

constexpr WeightGradPlan weight_grad_plan(const ConvBlockShape& s, Arithmetic a, bool gather,
                                          int arch, int64_t max_shared) {
  if (!arch_has(a, arch) || !gemm_serves(s) || s.N == 0) return {};
  // Two blocks for each multiprocessor of the largest devices. The number depends on the shape
  // alone, so that the sums are the same on every device.
  constexpr int64_t kBlocks = 264, kShared = 99 << 10;
  WeightGradPlan p{};
  p.config = gemm_config(a, gather, kGradChannels);
  p.config.warps = 8, p.config.groups = 1, p.config.weight_grad = true;
  p.tile = gemm_tile(map_shape(s), p.config, std::min(max_shared, kShared));
  if (!p.exists() || p.tile.boxes >= std::numeric_limits<int32_t>::max()) return {};
  p.units = grad_units(p.config, p.tile.taps, p.tile.channels);
  for (p.warps_n = 1; p.warps_n * kGradUnits < p.units;) p.warps_n *= 2;
  p.warps_k = p.config.warps / p.warps_n;
  p.channel_blocks = ceil_div(s.K, kGradChannels);
  const int64_t wanted = std::max<int64_t>(kBlocks / (p.channel_blocks * p.tile.chunks), 1);
  p.splits = ceil_div(p.tile.boxes, ceil_div(p.tile.boxes, wanted));
  return p;
}

}  // namespace fastcls::cuda
