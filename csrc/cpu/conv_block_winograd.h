// Winograd's forward kernels of the conv block over Vec; part of conv_block_kernels.h.

// F(2 × 2, 3 × 3): a 4 × 4 input patch gives a 2 × 2 output tile, which is the pool window if there
// is one, with 16 products per pair of channels where the direct sum has 36. With d the patch and g
// the kernel:
//
//   output = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A        (Lavin and Gray, arXiv:1509.09308)
//
//        1  0 -1  0          1   0   0
//   Bᵀ = 0  1  1  0     G =  ½   ½   ½     Aᵀ = 1  1  1  0
//        0 -1  1  0          ½  -½   ½          0  1 -1 -1
//        0  1  0 -1          0   0   1
//
// Output row 0 sees patch rows 0 … 2 and row 1 sees 1 … 3, as in the direct sum, so that a NaN
// reaches the same outputs. An infinity would become NaN: a tile with a result that is not finite
// is done again directly. Where a map without a pool ends with half a tile, the other half is
// dropped: what the patch has beyond the image (the next row, or a row of zeros) does not reach the
// half that is kept.

constexpr int kPositions = 16;

// G g along one axis.
[[gnu::always_inline]] inline void winograd_kernel_axis(Vec g0, Vec g1, Vec g2, Vec (&u)[4]) {
  const Vec half = Vec::set(0.5f), outer = (g0 + g2) * half, inner = g1 * half;
  u[0] = g0, u[1] = outer + inner, u[2] = outer - inner, u[3] = g2;
}

// G g Gᵀ [position][c][channels] of a block's packed weights [tap][c][channels], with `step` = c ·
// channels.
inline void winograd_weight(int64_t step, const float* weight, float* u) {
  for (int64_t e = 0; e < step; e += L) {
    Vec columns[3][4], row[4];
    for (int j = 0; j < 3; ++j)
      winograd_kernel_axis(Vec::load(weight + j * step + e), Vec::load(weight + (3 + j) * step + e),
                           Vec::load(weight + (6 + j) * step + e), columns[j]);
    for (int i = 0; i < 4; ++i) {
      winograd_kernel_axis(columns[0][i], columns[1][i], columns[2][i], row);
      for (int j = 0; j < 4; ++j) row[j].store(u + (4 * i + j) * step + e);
    }
  }
}

// Bᵀ d B of the patch at x, all channels: v[position · stride + c].
inline void winograd_input(const float* x, int64_t row, int64_t C, float* v, int64_t stride) {
  for (int64_t c = 0; c < C; c += L) {
    Vec d[4][4];
    for (int j = 0; j < 4; ++j) {
      Vec column[4];
      for (int i = 0; i < 4; ++i) column[i] = Vec::load(x + i * row + j * C + c);
      d[0][j] = column[0] - column[2];
      d[1][j] = column[1] + column[2];
      d[2][j] = column[2] - column[1];
      d[3][j] = column[1] - column[3];
    }
    for (int i = 0; i < 4; ++i) {
      (d[i][0] - d[i][2]).store(v + (4 * i) * stride + c);
      (d[i][1] + d[i][2]).store(v + (4 * i + 1) * stride + c);
      (d[i][2] - d[i][1]).store(v + (4 * i + 2) * stride + c);
      (d[i][1] - d[i][3]).store(v + (4 * i + 3) * stride + c);
    }
  }
}

// Tiles of a product's register block: tiles × vectors fill the registers as in conv_tile.
constexpr int tiles_in_registers(int vecs) {
  return L == 16 ? (vecs == 4 ? 6 : vecs == 3 ? 8 : 12) : 12 / vecs;
}
constexpr int kMinTiles = 12;  // the most of them

// m [tiles, kVecs · L] = v [tiles, C] · u [C, kVecs · L], tiles at least tiles_in_registers: the
// last group overlaps the one before. What follows u is asked for, a line a step: the next
// position's, which for many channels comes from the third-level cache.
template <int kVecs>
void multiply(const float* v, const float* u, int64_t C, int64_t tiles, float* m) {
  constexpr int kTiles = tiles_in_registers(kVecs), kWidth = kVecs * L, kLine = 64 / sizeof(float);
  const float* next = u + C * kWidth;
  for (int64_t at = 0; at < tiles; at += kTiles) {
    const int64_t t = std::min(at, tiles - kTiles);
    Vec sum[kTiles][kVecs];
    for (int i = 0; i < kTiles; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec::zero();
    const float *w = u, *x = v + t * C;
    for (int64_t c = 0; c < C; ++c, w += kWidth, next += kLine) {
      __builtin_prefetch(next, 0, 2);
      Vec weight[kVecs];
      for (int j = 0; j < kVecs; ++j) weight[j] = Vec::load(w + j * L);
      for (int i = 0; i < kTiles; ++i) {
        const Vec value = Vec::set(x[i * C + c]);
        for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec::fma(value, weight[j], sum[i][j]);
      }
    }
    for (int i = 0; i < kTiles; ++i)
      for (int j = 0; j < kVecs; ++j) sum[i][j].store(m + (t + i) * kWidth + j * L);
  }
}

// Aᵀ m A of one vector: window positions in row-major order, bias added.
[[gnu::always_inline]] inline void winograd_output(const float* m, int64_t stride, Vec bias,
                                                   Vec (&y)[4]) {
  Vec upper[4], lower[4];
  for (int j = 0; j < 4; ++j) {
    const Vec m0 = Vec::load(m + j * stride), m1 = Vec::load(m + (4 + j) * stride);
    const Vec m2 = Vec::load(m + (8 + j) * stride), m3 = Vec::load(m + (12 + j) * stride);
    upper[j] = m0 + m1 + m2;
    lower[j] = m1 - m2 - m3;
  }
  y[0] = upper[0] + upper[1] + upper[2] + bias;
  y[1] = upper[1] - upper[2] - upper[3] + bias;
  y[2] = lower[0] + lower[1] + lower[2] + bias;
  y[3] = lower[1] - lower[2] - lower[3] + bias;
}

// How the tiles cover a band: outputs [rows, width] of each of several images, one after the other.
// A window is an output; without a pool a tile is 2 × 2 of them, or what is left at the far edges.
struct TileGrid {
  bool pooled;
  int64_t rows, width;       // of outputs
  int64_t tile_rows, tiles;  // rows of tiles, and tiles in a row

  TileGrid(const ConvBlockShape& s, int64_t rows)
      : pooled(windows_are_2x2(s)),
        rows(rows),
        width(s.out_w),
        tile_rows(pooled ? rows : (rows + 1) / 2),
        tiles(pooled ? s.out_w : (s.out_w + 1) / 2) {}
  int64_t count() const { return tile_rows * tiles; }

  struct Place {
    int64_t image, row, column;  // of the tile in the grid
  };
  Place place(int64_t t) const { return {t / count(), t % count() / tiles, t % tiles}; }
};

// Stores tile t, whose four results are y.
[[gnu::always_inline]] inline void store_tile(const TileGrid& grid, bool relu, int64_t t,
                                              const Vec (&y)[4], const Results& to, int vec) {
  if (grid.pooled) return store_window(relu, y, to, t, vec);
  const auto at = grid.place(t);
  for (int q = 0; q < 4; ++q) {
    const int64_t row = 2 * at.row + q / 2, column = 2 * at.column + q % 2;
    if (row == grid.rows || column == grid.width) continue;
    Vec best = y[q];
    Vec::Bytes code = Vec::bytes(0);
    if (relu) apply_relu(best, code);
    to.store((at.image * grid.rows + row) * grid.width + column, vec, best, code);
  }
}

// One block of channels of tiles [first, first + tiles), whose transformed patches are
// v [position, tile, C]. patch(t) is tile t's patch; w: the block's direct weights, for tiles that
// are not finite.
template <int kVecs, typename Patch>
void winograd_block(const ConvBlockShape& s, const TileGrid& grid, const float* v, int64_t first,
                    int64_t tiles, int64_t padded_tiles, const float* u, const float* w,
                    const float* bias, const Runs& runs, float* m, const Results to,
                    const Patch& patch) {
  const bool relu = s.relu;
  constexpr int kWidth = kVecs * L;
  const int64_t stride = padded_tiles * kWidth;
  for (int p = 0; p < kPositions; ++p)
    multiply<kVecs>(v + p * padded_tiles * s.C, u + p * s.C * kWidth, s.C, padded_tiles,
                    m + p * stride);
  for (int64_t t = 0; t < tiles; ++t) {
    Vec y[kVecs][4], difference = Vec::zero();
    for (int j = 0; j < kVecs; ++j) {
      winograd_output(m + t * kWidth + j * L, stride, Vec::load(bias + j * L), y[j]);
      const Vec sum = y[j][0] + y[j][1] + y[j][2] + y[j][3];
      difference = difference + (sum - sum);  // 0, or NaN if any is not finite
    }
    if (Vec::bits(Vec::is_nan(difference))) {
      Tile<kVecs> tile;
      const int64_t row = (s.W + 2 * s.pad_w) * s.C;
      conv_tile<kVecs>(patch(first + t), {s.C, row, 0}, runs, w, bias, tile);
      for (int j = 0; j < kVecs; ++j)
        for (int p = 0; p < 4; ++p) y[j][p] = tile.sum[p][j];
    }
    for (int j = 0; j < kVecs; ++j) store_tile(grid, relu, first + t, y[j], to, j);
  }
}
