// Shape → launch configuration, as pure functions.
#pragma once

#include <algorithm>
#include <cstdint>

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
  t.elements = s.kernel_h * s.kernel_w * s.group_in() + 1;
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

}  // namespace fastcls::cuda
