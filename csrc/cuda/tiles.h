// Shape → launch configuration, as pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "shapes.h"

namespace fastcls::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory that a launch gets without asking the driver: a block has 48 KiB, but the arrays
// that a kernel declares take their part of it.
constexpr int64_t kSharedWithoutAsking = 32 << 10;

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

// From one channel's row to the next in partial sums: rows start on 32 bytes, a sector of memory.
constexpr int64_t weight_grad_row(const ConvBlockShape& s) {
  return ceil_div(weight_grad_elements(s), 8) * 8;
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

// Operands of the product: on the matrix unit 16-bit ones, tf32, or floats as three products of
// tf32; floats with multiply-adds where there is none.
enum class Arithmetic { kBf16, kF16, kTf32, kTf32x3, kFloat };

// What a kernel is compiled for.
struct GemmConfig {
  int element_bytes;  // of an operand in shared memory
  bool matrix_unit;   // else float multiply-adds
  bool splits;        // operands are split and multiplied three times
  bool fold;          // few input channels: a kernel row's pixels are one run of channels
  int columns;        // output channels of a block
  int warps, groups;  // a warp has `groups` times 32 rows
  bool weight_grad;   // the sum runs over the positions: see WeightGradPlan
  bool pixel_table;   // the patch is loaded through a table of its pixels

  constexpr int rows() const { return 32 * warps * groups; }
  // Of 64 columns: else registers are left for 32.
  constexpr bool has_wide_blocks() const { return matrix_unit && !splits; }
  // Channels come in steps of 32 bytes, one fragment of the matrix unit or 8 columns of dW, or of
  // one vector of floats.
  constexpr int step() const { return (matrix_unit || weight_grad ? 32 : 16) / element_bytes; }
};

// 256 rows to a block. On the matrix unit a thread has 4 rows by 8 or 16 columns: 16 products of
// fragments for 6 loads of 4. With multiply-adds it has 8 by 8: 256 of them for 16 loads of 4
// floats, which leaves them, not shared memory, as the limit.
constexpr GemmConfig gemm_config(Arithmetic a, bool fold, int columns) {
  const bool matrix_unit = a != Arithmetic::kFloat;
  const int bytes = a == Arithmetic::kBf16 || a == Arithmetic::kF16 ? 2 : 4;
  return {bytes,   matrix_unit,         a == Arithmetic::kTf32x3, fold,
          columns, matrix_unit ? 8 : 4, matrix_unit ? 1 : 2,      false,
          true};
}

// One pixel of the patch, or one output of a box: where it lies, in shared memory's table. A larger
// patch of few channels has none in the forward pass: it would take as much memory as the patch.
constexpr int64_t kPatchEntryBytes = 16, kMostTablePixels = 1024;

// How the rows of the product are numbered. 32 rows are one output each; or the 4 positions of 8
// windows of 2 x 2, so that one thread holds a window's positions in registers; or the positions of
// a box of the conv map, which is pooled in shared memory.
enum class Pooling { kNone, kWindow, kShared };

constexpr Pooling pooling_of(const ConvBlockShape& s) {
  if (s.window() == 1) return Pooling::kNone;
  return s.pool_h == 2 && s.pool_w == 2 ? Pooling::kWindow : Pooling::kShared;
}

// A block computes a box of images x box_h x box_w outputs at a time, from the patch of the input
// under it, of which `channels` lie in shared memory at a time. Sizes in bytes are those of shared
// memory: a patch's pixel is its channels and 16 bytes, an odd number of 16-byte pieces, so that 8
// pixels in a row lie in different banks. Where neighbouring rows of the product are `interleave`
// columns of the input apart, these columns lie next to each other: column x at
// x % interleave * run + x / interleave.
//
// With `fold` a pixel has 1, 4 or 8 channels, padded, and nothing between it and the next, so that
// all pixels under a row of the kernel are one run of the sum: its taps are the kernel's rows.
// Where several pixels, 2 or 4, make up the 16 bytes that the matrix unit loads at a time, there
// are as many copies of the patch: column x starts an aligned run in the copy x % copies. Strides
// of a multiple of that many columns need the first copy alone.
struct GemmTile {
  Pooling pooling;
  int images, box_h, box_w;
  int64_t units;
  int unit_h, unit_w;          // what rows stand for: outputs, windows or positions of the box
  int boxes_h, boxes_w;        // boxes along an image's outputs
  int64_t boxes;               // in all
  int taps, channels, chunks;  // chunks of `channels` make up all of them
  int depth_bytes;             // of the sum over one tap
  int patch_h, patch_w, interleave, run;
  int pixel_bytes, row_bytes, image_bytes;
  int copies, copy_bytes, patch_bytes;  // from one copy to the next (0: there is one); of all
  int step_h, step_w;                   // between neighbouring units, in the input
  int run_words;                        // of a run's last 32 bytes, 0: all of them
  int weight_row_bytes;
  int map_bytes;  // 0: the map lies where the patch was
  int64_t weight_bytes, table_entries;
  int pixels, table_pixels;  // of the patch; in the table, all or none
  int outputs;               // of a box
  int64_t work;              // see gemm_tile
  int64_t shared_bytes;
  Divider by_boxes_w, by_boxes_h, by_unit_w, by_unit_h, by_patch_w, by_patch_h, by_pixels,
      by_interleave, by_vectors;
};

// The product for dW: 32 output channels by up to 72 units of 8 columns, (tap, channel) pairs; a
// warp holds up to 9 units in 72 registers a thread: one for each tap of a 3 x 3 kernel.
constexpr int kGradChannels = 32, kGradUnits = 9;
// What its blocks add up at the end: a warp's sums, for up to 4 warps.
constexpr int kWeightGradFloats = 4 * 2 * kGradUnits * 4 * 32;
// A step of its sum is 4 windows by 4 places, or 16 outputs where a window is one position. Windows
// of more places take several steps, and of more than 16 the general kernels.
constexpr int kGradStep = 16, kMostGradPlaces = 16;

constexpr int64_t grad_window_steps(const ConvBlockShape& s) { return (s.window() + 3) / 4; }
constexpr int64_t grad_step_units(const ConvBlockShape& s) { return s.window() == 1 ? 16 : 4; }

// An output's gradients in shared memory, and its winners' codes: four outputs, 8 lanes each, lie
// in different banks.
constexpr int grad_row_bytes(int element_bytes) { return kGradChannels * element_bytes + 32; }
constexpr int kGradCodeBytes = kGradChannels + 16;

// Columns of the map that are pooled at a time.
constexpr int64_t kMapColumns = 32;

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Units of 8 columns of dW: of a tap's channels, or with `fold` of a kernel row's run.
constexpr int64_t grad_units(const GemmTile& t, const GemmConfig& c) {
  return t.taps * t.depth_bytes / (8 * c.element_bytes);
}

// The tile with this box; shared_bytes says whether it fits.
constexpr GemmTile gemm_tile_of(const ConvBlockShape& s, const GemmConfig& c, int64_t channels,
                                int64_t images, int64_t box_h, int64_t box_w) {
  GemmTile t{};
  t.pooling = pooling_of(s);
  const bool positions = t.pooling == Pooling::kShared && !c.weight_grad;
  const int64_t conv_h = (box_h - 1) * s.pool_stride_h + s.pool_h;
  const int64_t conv_w = (box_w - 1) * s.pool_stride_w + s.pool_w;
  t.images = images, t.box_h = box_h, t.box_w = box_w;
  t.unit_h = positions ? conv_h : box_h, t.unit_w = positions ? conv_w : box_w;
  t.units = images * (positions ? conv_h * conv_w : box_h * box_w);
  t.boxes_h = ceil_div(s.out_h, box_h), t.boxes_w = ceil_div(s.out_w, box_w);
  t.boxes = ceil_div(s.N, images) * t.boxes_h * t.boxes_w;
  t.taps = s.kernel_h * (c.fold ? 1 : s.kernel_w);
  t.channels = channels;
  t.chunks = ceil_div(s.C, channels);
  const int64_t step = c.weight_grad ? 8 : c.step();
  const int64_t depth = c.fold ? round_up(s.kernel_w * channels, step) : channels;
  t.depth_bytes = depth * c.element_bytes;

  t.patch_h = (conv_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  t.patch_w = (conv_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  t.step_w = s.stride_w * (positions ? 1 : s.pool_stride_w);
  t.step_h = s.stride_h * (positions ? 1 : s.pool_stride_h);
  t.interleave = c.fold || c.weight_grad ? 1 : t.step_w;
  // dW reads pixels of floats word by word: with 8 words more, 4 pixels by 8 channels have a bank
  // each.
  const int64_t apart = c.fold ? 0 : c.weight_grad && c.element_bytes == 4 ? 32 : 16;
  t.pixel_bytes = channels * c.element_bytes + apart;
  const int64_t per_load = c.fold ? std::max(16 / t.pixel_bytes, 1) : 1;  // pixels
  t.run = round_up(ceil_div(t.patch_w, t.interleave), per_load);
  t.row_bytes = t.interleave * t.run * t.pixel_bytes;
  t.image_bytes = t.patch_h * t.row_bytes;
  const int64_t one_copy = round_up(images * t.patch_h * t.row_bytes, 16);
  // The copies' share of all banks' 128 bytes from a multiple of them: the runs of 8 neighbouring
  // columns lie in different banks.
  if (s.stride_w % per_load != 0) t.copy_bytes = round_up(one_copy, 128) + 128 / per_load;
  t.copies = t.copy_bytes ? per_load : 1;
  const int64_t patch_bytes = (t.copies - 1) * t.copy_bytes + one_copy;
  t.patch_bytes = patch_bytes;

  t.run_words = c.fold ? s.kernel_w * t.pixel_bytes % 32 / 4 : 0;
  t.weight_row_bytes = t.depth_bytes + 16;
  t.weight_bytes = int64_t{c.columns} * t.taps * t.weight_row_bytes;
  // An odd number of words: a column's rows in other banks.
  const int64_t map_row_bytes = 4 * (std::min<int64_t>(c.columns, kMapColumns) + 1);
  const int64_t map_rows = round_up(t.units, 32 * c.groups);  // of warps that have any
  const int64_t map_bytes = positions ? round_up(map_rows * map_row_bytes, 16) : 0;
  t.map_bytes = map_bytes > patch_bytes ? map_bytes : 0;
  t.table_entries = 2 * t.taps;
  t.pixels = images * t.patch_h * t.patch_w;
  const bool has_table =
      c.pixel_table && (!c.fold || c.weight_grad || t.pixels <= kMostTablePixels);
  t.table_pixels = has_table ? t.pixels : 0;
  t.outputs = images * box_h * box_w;
  const int64_t pixel_table = kPatchEntryBytes * t.table_pixels;
  t.shared_bytes = t.weight_bytes + 2 * patch_bytes + t.map_bytes +
                   round_up(4 * (t.table_entries + c.columns + c.rows()), 16) + pixel_table +
                   kPatchEntryBytes * t.outputs;
  if (c.weight_grad) {
    const int64_t units = round_up(t.units, grad_step_units(s));
    t.table_entries = kGradStep * units / grad_step_units(s) * grad_window_steps(s);
    t.shared_bytes =
        2 * (patch_bytes + units * (grad_row_bytes(c.element_bytes) + kGradCodeBytes)) +
        4 * t.table_entries + pixel_table + kPatchEntryBytes * units;
    t.shared_bytes = std::max<int64_t>(t.shared_bytes, 4 * kWeightGradFloats);
  }
  t.by_boxes_w = Divider(t.boxes_w), t.by_boxes_h = Divider(t.boxes_h);
  t.by_unit_w = Divider(t.unit_w), t.by_unit_h = Divider(t.unit_h);
  t.by_patch_w = Divider(t.patch_w), t.by_patch_h = Divider(t.patch_h);
  t.by_pixels = Divider(t.pixels);
  t.by_interleave = Divider(t.interleave);
  t.by_vectors = Divider(c.fold ? 1 : channels * c.element_bytes / 16);
  return t;
}

// Two blocks for each multiprocessor of the largest devices. The number depends on the shape alone,
// so that sums are the same on every device.
constexpr int64_t kGemmBlocks = 264;

// The largest box of this width that fits, as many images as there is room for, at most
// `most_images`; units = 0: none.
constexpr GemmTile gemm_tile_of_width(const ConvBlockShape& s, const GemmConfig& c,
                                      int64_t channels, int64_t box_w, int64_t most_images,
                                      int64_t max_shared) {
  const auto fits = [&](const GemmTile& t) {
    if (t.shared_bytes > max_shared) return false;
    if (c.weight_grad)
      return t.table_entries <= c.rows() && grad_units(t, c) <= kGradUnits * c.warps;
    return t.units <= (t.pooling == Pooling::kWindow ? c.rows() / 4 : c.rows()) &&
           t.images * s.K * s.out_h * s.out_w <= std::numeric_limits<int32_t>::max();
  };
  int64_t box_h = std::min<int64_t>(s.out_h, c.rows() / box_w);
  while (box_h > 0 && !fits(gemm_tile_of(s, c, channels, 1, box_h, box_w))) --box_h;
  if (box_h <= 0) return {};
  const int64_t equal = ceil_div(s.out_h, ceil_div(s.out_h, box_h));
  if (fits(gemm_tile_of(s, c, channels, 1, equal, box_w))) box_h = equal;
  int64_t images = 1;
  if (box_h == s.out_h && box_w == s.out_w) {
    images = std::max<int64_t>(1, std::min<int64_t>(most_images, c.rows() / (box_h * box_w)));
    while (!fits(gemm_tile_of(s, c, channels, images, box_h, box_w))) --images;
  }
  return gemm_tile_of(s, c, channels, images, box_h, box_w);
}

// Channels of a pixel, padding included, at first tried all at once. A pixel of less than 4 bytes
// would take more copies than they save.
constexpr int64_t pixel_channels(const ConvBlockShape& s, const GemmConfig& c) {
  if (c.fold && s.C == 1 && c.matrix_unit && c.element_bytes == 4) return 1;
  if (c.fold) return s.C <= 4 ? 4 : 8;
  return round_up(s.C, c.step());
}

// Three products that wait for each other take as long for 128 rows, half of a block's warps, as
// for fewer.
constexpr int64_t counted_rows(const GemmConfig& c, int64_t rows) {
  return std::max<int64_t>(round_up(rows, 32), c.splits && !c.weight_grad ? 128 : 0);
}

// The tile with the least work for one of the `blocks` that share the boxes; units = 0 where none
// fits. Work is counted in rows of the product: those of the box, and 64 for its start; a pixel of
// the patch, which is loaded once for all taps, as half a row; and the weights where they have to
// be copied anew for each box, as long as 96 rows on the matrix unit, or 8 rows of multiply-adds.
constexpr GemmTile gemm_tile(const ConvBlockShape& s, const GemmConfig& c, int64_t max_shared,
                             int64_t blocks) {
  GemmTile best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t channels = pixel_channels(s, c); channels > 0;) {
    const int64_t share =
        std::max<int64_t>(blocks / (c.weight_grad ? ceil_div(s.C, channels) : 1), 1);
    // Rather fewer of them than to leave multiprocessors without a box.
    const int64_t most_images = ceil_div(s.N, share);
    for (int64_t splits = 1; splits <= std::min<int64_t>(s.out_w, 16); ++splits) {
      const int64_t box_w = ceil_div(s.out_w, splits);
      const GemmTile t = gemm_tile_of_width(s, c, channels, box_w, most_images, max_shared);
      if (t.units == 0) continue;
      const int64_t rows = c.weight_grad                   ? t.table_entries * t.chunks
                           : t.pooling == Pooling::kWindow ? 4 * t.units
                                                           : t.units;
      const int64_t reload = c.weight_grad || t.chunks == 1 ? 0 : c.matrix_unit ? 96 : 8;
      const int64_t work =
          ceil_div(t.boxes, share) * (counted_rows(c, rows) + 64 + t.pixels / 2 + reload);
      if (work < least) least = work, best = t, best.work = work;
    }
    if (c.fold || channels == c.step()) break;
    channels = round_up(channels / 2, c.step());
  }
  return best;
}

// Sizes that the kernels hold in 32 bits, those of one image included, and no groups.
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
  const int64_t images[] = {s.N, s.C * s.H * s.W, s.K * s.conv_h * s.conv_w,
                            s.K * s.out_h * s.out_w};
  for (int64_t size : images)
    if (size > std::numeric_limits<int32_t>::max()) return false;
  return s.groups == 1 && !s.wide_winner();
}

// The matrix unit reads tf32 and bfloat16 from compute capability 8.0 on.
constexpr bool arch_has(Arithmetic a, int arch) {
  return a == Arithmetic::kFloat || a == Arithmetic::kF16 || arch >= 80;
}

// 32 bits hold their number times chunks, and Divider takes the number apart.
constexpr bool boxes_are_narrow(const GemmTile& t) {
  return t.boxes * std::max(t.chunks, std::max(t.boxes_w, t.boxes_h)) <
         std::numeric_limits<int32_t>::max();
}

// A multiprocessor has a KiB more of shared memory than a block may ask for, and each of its blocks
// takes one (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
constexpr int64_t kSharedOfBlock = 1 << 10;

// What each of `blocks` may ask for.
constexpr int64_t shared_for(int64_t blocks, int64_t max_shared) {
  return (max_shared + kSharedOfBlock) / blocks - kSharedOfBlock;
}

// How many may ask for `shared`.
constexpr int64_t blocks_with(int64_t shared, int64_t max_shared) {
  return (max_shared + kSharedOfBlock) / (shared + kSharedOfBlock);
}

constexpr int64_t kMostGridY = 65535;  // blocks along y, of every device

struct GemmPlan {
  GemmConfig config;
  GemmTile tile;  // units = 0: there is none, the general kernels serve
  constexpr bool exists() const { return tile.units > 0; }
};

// How the matrix-product kernels would compute this block. `max_shared` is what a block may ask
// for: with 160 KiB and more, two blocks on a multiprocessor are tried as well as one with all the
// memory, which does three quarters of what two do in the same time. 64 columns, for more than 32
// channels, take 1.4 times as long as 32; 16 serve up to 16 channels.
constexpr GemmPlan gemm_plan(const ConvBlockShape& s, Arithmetic a, bool fold, bool pixel_table,
                             int arch, int64_t max_shared) {
  if (!arch_has(a, arch) || !gemm_serves(s)) return {};
  constexpr int64_t kForTwo = 160 << 10;
  GemmPlan best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int blocks : {2, 1})
    for (int columns : {64, s.K <= 16 ? 16 : 32}) {
      if (blocks == 2 && max_shared < kForTwo) continue;
      const bool shared_pool = pooling_of(s) == Pooling::kShared && !fold;
      GemmConfig c = gemm_config(a, fold, columns);
      if (columns == 64 && (s.K <= 32 || !c.has_wide_blocks() || shared_pool)) continue;
      c.pixel_table = pixel_table;
      const int64_t column_blocks = ceil_div(s.K, columns);
      if (column_blocks > kMostGridY) continue;
      const int64_t at_once = std::max<int64_t>(kGemmBlocks / 2 * blocks / column_blocks, 1);
      const GemmTile t = gemm_tile(s, c, shared_for(blocks, max_shared), at_once);
      if (t.units == 0 || !boxes_are_narrow(t)) continue;
      const int64_t work = t.work * (columns == 64 ? 14 : 10) * (blocks == 2 ? 4 : 3);
      if (work < least) least = work, best = {c, t};
    }
  return best;
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

// dW and db: a block owns 32 output channels and a chunk of the input's channels, and goes over
// every `splits`-th part of the boxes. Its warps are warps_n for the units, each_n to a warp, times
// warps_k that take turns at the steps.
struct WeightGradPlan {
  GemmConfig config;
  GemmTile tile;
  int units, each_n, warps_n, warps_k;
  int steps, window_steps;  // of a full box; of a window
  int64_t channel_blocks, splits;
  Divider by_window_steps, by_pool_w, by_taps, by_kernel_w, by_run_units;
  constexpr bool exists() const { return tile.units > 0; }
};

constexpr WeightGradPlan weight_grad_plan(const ConvBlockShape& s, Arithmetic a, bool fold,
                                          int arch, int64_t max_shared) {
  if (!arch_has(a, arch) || !gemm_serves(s) || s.N == 0 || s.window() > kMostGradPlaces) return {};
  constexpr int64_t kShared = 99 << 10;
  WeightGradPlan p{};
  p.config = gemm_config(a, fold, kGradChannels);
  p.config.warps = 8, p.config.groups = 4, p.config.weight_grad = true;
  p.channel_blocks = ceil_div(s.K, kGradChannels);
  const int64_t blocks = std::max<int64_t>(kGemmBlocks / p.channel_blocks, 1);
  p.tile = gemm_tile(s, p.config, std::min(max_shared, kShared), blocks);
  if (!p.exists() || !boxes_are_narrow(p.tile)) return {};
  if (p.channel_blocks * p.tile.chunks > kMostGridY) return {};
  p.units = grad_units(p.tile, p.config);
  for (p.warps_n = 1; p.warps_n * kGradUnits < p.units;) p.warps_n *= 2;
  p.each_n = ceil_div(p.units, p.warps_n);
  p.warps_k = p.config.warps / p.warps_n;
  p.steps = p.tile.table_entries / kGradStep, p.window_steps = grad_window_steps(s);
  p.by_window_steps = Divider(p.window_steps), p.by_pool_w = Divider(s.pool_w);
  p.by_taps = Divider(p.tile.taps), p.by_kernel_w = Divider(s.kernel_w);
  p.by_run_units = Divider(p.units / p.tile.taps);
  const int64_t wanted = std::max<int64_t>(blocks / p.tile.chunks, 1);
  p.splits = ceil_div(p.tile.boxes, ceil_div(p.tile.boxes, wanted));
  return p;
}

}  // namespace fastcls::cuda
