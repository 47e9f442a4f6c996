// What both backward passes of the conv block need; part of conv_block_kernels.h.

// The gradient is sparse: one conv-map position per pooled output. Both passes work on rows of
// taps × input channels held in registers, kRuns runs × kVecs vectors at a time:
// AVX2: 12 sums + 1 broadcast of 16 registers; AVX-512: 18 of 32, a whole 3 × 3 × 32 kernel.
constexpr int kMaxSums = L == 16 ? 18 : 12;
constexpr int kMaxRuns = 3;
// Vectors of one run at most, unless its taps have more: 3 taps × 32 channels, or × 48 where fewer
// channels are padding then.
constexpr int kRunVecs = 96 / L, kLongRunVecs = L == 16 ? 144 / L : kRunVecs;

// Input channels are done in groups whose runs fit the registers, as equal as possible: many
// positions of a narrow image fit the first-level cache, and the registers are loaded less often.
struct ChannelGroups {
  int64_t count, channels;  // all groups are laid out as `channels` wide; the last may have fewer
  ConvBlockShape shape;     // of one group

  explicit ChannelGroups(const ConvBlockShape& s) : shape(s) {
    split(s, kLongRunVecs);
    const int64_t laid_out = count * channels;
    split(s, kRunVecs);
    if (laid_out < count * channels) split(s, kLongRunVecs);
    shape.C = channels;
  }
  int64_t begin(int64_t group) const { return group * channels; }
  int64_t width(int64_t group, int64_t C) const { return std::min(channels, C - begin(group)); }

 private:
  void split(const ConvBlockShape& s, int64_t run_vecs) {
    const int64_t taps = s.dilation_w == 1 ? s.kernel_w : 1;
    const int64_t most = std::max<int64_t>(run_vecs / taps, 1) * L;
    count = (s.C + most - 1) / most;
    channels = count == 1 ? s.C : round_up((s.C + count - 1) / count, L);
    count = (s.C + channels - 1) / channels;
  }
};

// Which runs, and which vectors of each, are in registers together.
struct Pass {
  int64_t run, runs, vec, vecs;
  int64_t sums() const { return runs * vecs; }
};

inline std::vector<Pass> passes_over(const Runs& runs, int64_t max_sums) {
  const int64_t vecs = (runs.length + L - 1) / L;
  const int64_t together = std::clamp<int64_t>(max_sums / vecs, 1, kMaxRuns);
  const int64_t groups = (runs.count + together - 1) / together;
  const int64_t blocks = (vecs + max_sums - 1) / max_sums;
  std::vector<Pass> passes;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t r0 = g * runs.count / groups, r1 = (g + 1) * runs.count / groups;
      const int64_t v0 = b * vecs / blocks, v1 = (b + 1) * vecs / blocks;
      passes.push_back({r0, r1 - r0, v0, v1 - v0});
    }
  return passes;
}

inline int64_t floats_of(const std::vector<Pass>& passes) {
  int64_t sums = 0;
  for (const Pass& pass : passes) sums += pass.sums();
  return sums * L;
}

// Calls f(at, row, n) for the pieces of a pass's run r that are rows of weights: n floats from `at`
// on of the pass's vectors are those from `row` on of a row of kernel × C.
template <typename F>
void for_pieces(const Runs& runs, const Pass& pass, int64_t r, const ChannelGroups& groups,
                int64_t group, int64_t C, const F& f) {
  const int64_t first = pass.vec * L, end = std::min(first + pass.vecs * L, runs.length);
  const int64_t taps = runs.length / groups.channels;
  for (int64_t e = first; e < end;) {
    const int64_t tap = e / groups.channels, c = e % groups.channels;
    const int64_t length = std::min(groups.channels - c, end - e);
    const int64_t n = std::clamp<int64_t>(groups.width(group, C) - c, 0, length);
    f(e - first, ((pass.run + r) * taps + tap) * C + groups.begin(group) + c, n);
    e += length;
  }
}

template <int kRuns, int kVecs>
[[gnu::always_inline]] inline void add_runs(const Rows& rows, const int64_t* run, Factors g,
                                            Vec (&sum)[kRuns][kVecs]) {
#pragma GCC unroll 3
  for (int r = 0; r < kRuns; ++r)
    add_rows<kVecs>(rows_at([&](int i) { return rows.of[i] + run[r]; }), g, sum[r]);
}

// Channels whose sums are in registers together: a sum is ready for its next addition after 4
// cycles, in which 8 can be made.
template <int kSums>
constexpr int kTogether = std::max(1, std::min((7 + kSums) / kSums, kMaxSums / kSums));

// dw[k] += Σ_p g[k][p] · x[at[k][p] ...] for kTogether channels; g and at [channels, stride].
template <int kRuns, int kVecs, int kChannels>
void add_positions(const Operand* x, const int64_t* run, const Operand* g, const int32_t* at,
                   int64_t stride, int64_t n, float* dw) {
  constexpr int kRow = kRuns * kVecs * L;
  Vec sum[kChannels][kRuns][kVecs];
  for (int k = 0; k < kChannels; ++k)
    for (int r = 0; r < kRuns; ++r)
      for (int v = 0; v < kVecs; ++v) sum[k][r][v] = Vec::load(dw + k * kRow + (r * kVecs + v) * L);
  int64_t p = 0;
  for (; p + kEntries <= n; p += kEntries)
#pragma GCC unroll 8
    for (int k = 0; k < kChannels; ++k) {
      const int32_t* first = at + k * stride + p;
      add_runs<kRuns, kVecs>(rows_at([&](int i) { return x + first[i]; }), run,
                             factor_of(g + k * stride + p), sum[k]);
    }
  for (int k = 0; k < kChannels && p < n; ++k) {
    const int32_t* last = at + k * stride + p;
    add_runs<kRuns, kVecs>(rows_at([&](int) { return x + *last; }), run,
                           last_factor(g + k * stride + p), sum[k]);
  }
  for (int k = 0; k < kChannels; ++k)
    for (int r = 0; r < kRuns; ++r)
      for (int v = 0; v < kVecs; ++v) sum[k][r][v].store(dw + k * kRow + (r * kVecs + v) * L);
}

// All channels of a tile's n positions.
template <int kRuns, int kVecs>
void add_positions_of_all(const Operand* x, const int64_t* run, const Operand* g, const int32_t* at,
                          int64_t stride, int64_t n, int64_t channels, float* dw) {
  constexpr int kRow = kRuns * kVecs * L, kStep = kTogether<kRuns * kVecs>;
  int64_t k = 0;
  for (; k + kStep <= channels; k += kStep)
    add_positions<kRuns, kVecs, kStep>(x, run, g + k * stride, at + k * stride, stride, n,
                                       dw + k * kRow);
  for (; k < channels; ++k)
    add_positions<kRuns, kVecs, 1>(x, run, g + k * stride, at + k * stride, stride, n,
                                   dw + k * kRow);
}

// What a pass of dX works on: the open channels of some windows, by winner, and where they go.
struct WindowList {
  const int64_t* offset;  // of each window in dX
  int64_t windows, places;
  const int32_t* begin;  // [windows · places + 1]: where a bucket's entries begin
  const Operand* g;
  const int32_t* channel;
  const Operand* no_row;  // zeros, where a bucket's last entry is alone
};

// dx[window + place ...] += Σ_e g[e] · w[channel[e]] over the entries of each bucket, each bucket
// summed on its own: with each product the error grows by the last bit of the sum that it is added
// to. The last vector of each run has `tail` lanes of its own; what lies behind them belongs to
// other pixels and is left as it is.
template <int kRuns, int kVecs>
void add_channels(float* dx, const int64_t* run, const Operand* w, const WindowList& list,
                  const int64_t* place, int64_t tail) {
  constexpr int kSums = kRuns * kVecs;
  const Vec::Mask own = Vec::first(tail);
  for (int64_t p = 0, bucket = 0; p < list.windows; ++p)
    for (int64_t q = 0; q < list.places; ++q, ++bucket) {
      const int64_t begin = list.begin[bucket], end = list.begin[bucket + 1];
      if (begin == end) continue;
      float* to = dx + list.offset[p] + place[q];
      Vec sum[kSums];
#pragma GCC unroll 18
      for (int i = 0; i < kSums; ++i) sum[i] = Vec::zero();
      const auto row = [&](int64_t e) { return w + list.channel[e] * (kSums * L); };
      int64_t e = begin;
      for (; e + kEntries <= end; e += kEntries)
        add_rows<kSums>(rows_at([&](int i) { return row(e + i); }), factor_of(list.g + e), sum);
      if (e < end)
        add_rows<kSums>(rows_at([&](int i) { return i == 0 ? row(e) : list.no_row; }),
                        last_factor(list.g + e), sum);
#pragma GCC unroll 18
      for (int i = 0; i < kSums; ++i) {
        float* at = to + run[i / kVecs] + i % kVecs * L;
        const Vec before = Vec::load(at), after = before + sum[i];
        const bool is_last = tail < L && i % kVecs == kVecs - 1;
        (is_last ? Vec::select(own, after, before) : after).store(at);
      }
    }
}

using AddPositions = void (*)(const Operand*, const int64_t*, const Operand*, const int32_t*,
                              int64_t, int64_t, int64_t, float*);
using AddChannels = void (*)(float*, const int64_t*, const Operand*, const WindowList&,
                             const int64_t*, int64_t);

template <int kRuns, int... kVecsLessOne>
AddPositions pick_add_positions(int64_t vecs, std::integer_sequence<int, kVecsLessOne...>) {
  static constexpr AddPositions kTable[] = {add_positions_of_all<kRuns, kVecsLessOne + 1>...};
  return kTable[vecs - 1];
}
template <int kRuns, int... kVecsLessOne>
AddChannels pick_add_channels(int64_t vecs, std::integer_sequence<int, kVecsLessOne...>) {
  static constexpr AddChannels kTable[] = {add_channels<kRuns, kVecsLessOne + 1>...};
  return kTable[vecs - 1];
}
template <int kRuns>
using VecCounts = std::make_integer_sequence<int, kMaxSums / kRuns>;

inline AddPositions add_positions_for(const Pass& pass) {
  if (pass.runs == 1) return pick_add_positions<1>(pass.vecs, VecCounts<1>{});
  if (pass.runs == 2) return pick_add_positions<2>(pass.vecs, VecCounts<2>{});
  return pick_add_positions<3>(pass.vecs, VecCounts<3>{});
}
inline AddChannels add_channels_for(const Pass& pass) {
  if (pass.runs == 1) return pick_add_channels<1>(pass.vecs, VecCounts<1>{});
  if (pass.runs == 2) return pick_add_channels<2>(pass.vecs, VecCounts<2>{});
  return pick_add_channels<3>(pass.vecs, VecCounts<3>{});
}

// Offset in the packed image of the first tap of place `code` of a window, less that of place 0.
inline int64_t place_offset(const ConvBlockShape& s, int64_t code) {
  return (code / s.pool_w * s.stride_h * (s.W + 2 * s.pad_w) + code % s.pool_w * s.stride_w) * s.C;
}
// Offset of place 0 of pooled output (ph, pw), from packed row `first` on. Negative where pool
// padding lies above: no winner has such a place.
inline int64_t window_offset(const ConvBlockShape& s, int64_t ph, int64_t pw, int64_t first) {
  const int64_t h = (ph * s.pool_stride_h - s.pool_pad_h) * s.stride_h - first;
  return (h * (s.W + 2 * s.pad_w) + (pw * s.pool_stride_w - s.pool_pad_w) * s.stride_w) * s.C;
}

// Pooled outputs are visited in tiles of `rows` rows × `columns` of them, whose input fills about
// half of a 32 KiB first-level cache.
struct OutputTile {
  int64_t rows, columns;

  explicit OutputTile(const ConvBlockShape& s) {
    constexpr int64_t kElements = 16384 / sizeof(Operand);
    const int64_t step_h = s.pool_stride_h * s.stride_h, step_w = s.pool_stride_w * s.stride_w;
    const int64_t most = std::max<int64_t>(kElements / (step_h * step_w * s.C), 1);
    const int64_t strips = (s.out_w + most - 1) / most;
    columns = (s.out_w + strips - 1) / strips;
    rows = std::max<int64_t>(most / columns, 1);
  }
};
