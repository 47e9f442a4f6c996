// Cross-entropy of kLanes rows at once, one to a lane, for rows of any strides. Part of
// cross_entropy_kernels.h.

// The tiles of C classes: of logits, then their exponentials, and of probabilities. On the stack up
// to kMaxTileClasses, which is the first-level cache too.
template <Spread kSpread>
class Tiles {
 public:
  explicit Tiles(int64_t C) {
    if (C > kMaxTileClasses) many_ = std::make_unique_for_overwrite<Lanes[]>(kCount * C);
    x = many_ ? many_[0].of : few_[0].of;
    t = kCount == 1 ? nullptr : many_ ? many_[C].of : few_[kMaxTileClasses].of;
  }
  Tiles(const Tiles&) = delete;
  float *x, *t;

 private:
  struct alignas(sizeof(Vec)) Lanes {
    float of[kLanes];
  };
  static constexpr int kCount = kSpread == Spread::kProbabilities ? 2 : 1;
  Lanes few_[kCount * kMaxTileClasses];
  std::unique_ptr<Lanes[]> many_;
};

// Copies rows [rows, C] of any strides into tile [C][kLanes]. Lanes without a row are 0.
template <typename T>
void pack_tile(const T* x, int64_t row, int64_t cls, int64_t rows, int64_t C, float* tile) {
  if (rows == kLanes && row == 1) {
    for (int64_t c = 0; c < C; ++c) Vec::load(x + c * cls).store(tile + c * kLanes);
  } else if (rows == kLanes && cls == 1 && C >= 4) {
    for (int64_t next = 0; next < C; next += 4) {
      const int64_t c = std::min(next, C - 4);  // the last block overlaps the one before
      Vec r[4];
      for (int i = 0; i < 4; ++i) r[i] = load_quads(x + i * row + c, 4 * row);
      transpose_quads(r);
      for (int i = 0; i < 4; ++i) r[i].store(tile + (c + i) * kLanes);
    }
#if defined(FASTCLS_AVX512)
  } else if (rows == kLanes && cls == 1) {
    const int n = static_cast<int>(C);
    Vec r[4];
    for (int i = 0; i < 4; ++i) r[i] = load_quads_part(x + i * row, 4 * row, n);
    transpose_quads(r);
    for (int i = 0; i < n; ++i) r[i].store(tile + i * kLanes);
#endif
  } else {
    for (int64_t c = 0; c < C; ++c)
      lanes_of([&](int i) {
        return i < rows ? static_cast<float>(x[i * row + c * cls]) : 0.0f;
      }).store(tile + c * kLanes);
  }
}

// Asks for the logits of the tiles to come, so far ahead as memory takes to answer while a tile is
// worked on. The processor's own prefetching ends at every page, and does not begin for each of
// many strided classes. What lies past the end is never read.
constexpr int64_t kAheadBytes = 4096, kAheadTiles = 4;
template <typename T>
[[gnu::always_inline]] inline void prefetch_tile(const T* x, int64_t row, int64_t cls, int64_t C) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (cls == 1 && row == C) {
    const T* ahead = x + kAheadBytes / sizeof(T);
    for (int64_t e = 0; e < kLanes * C; e += kLine) __builtin_prefetch(ahead + e);
  } else if (row == 1) {
    for (int64_t c = 0; c < C; ++c) __builtin_prefetch(x + c * cls + kAheadTiles * kLanes);
  }
}

// The way back, of the values(c) of the rows.
template <typename T, typename F>
void unpack_tile(const F& values, int64_t rows, int64_t C, T* out, int64_t row, int64_t cls) {
  if (rows == kLanes && row == 1) {
    for (int64_t c = 0; c < C; ++c) put(out + c * cls, values(c));
  } else if (rows == kLanes && cls == 1 && C >= 4) {
    for (int64_t next = 0; next < C; next += 4) {
      const int64_t c = std::min(next, C - 4);
      Vec r[4];
      for (int i = 0; i < 4; ++i) r[i] = values(c + i);
      transpose_quads(r);
      for (int i = 0; i < 4; ++i) store_quads(out + i * row + c, 4 * row, r[i]);
    }
#if defined(FASTCLS_AVX512)
  } else if (rows == kLanes && cls == 1) {
    const int n = static_cast<int>(C);
    Vec r[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    for (int i = 0; i < n; ++i) r[i] = values(i);
    transpose_quads(r);
    for (int i = 0; i < 4; ++i) store_quads_part(out + i * row, 4 * row, n, r[i]);
#endif
  } else {
    for (int64_t c = 0; c < C; ++c) {
      float lanes[kLanes];
      values(c).store(lanes);
      for (int64_t i = 0; i < rows; ++i) out[i * row + c * cls] = static_cast<T>(lanes[i]);
    }
  }
}

// q of class c for kLanes rows; t is the tile of their probabilities.
template <Spread kSpread, typename T, typename P>
inline Vec tile_q(const Run<T, P>& run, const float* t, int64_t c) {
  if constexpr (kSpread == Spread::kSmoothing) return Vec::set(run.uniform[c]);
  const Vec q = Vec::fma(Vec::set(run.keep), Vec::load(t + c * kLanes), Vec::set(run.spread));
  return run.weight ? Vec::set(run.weight[c]) * q : q;
}

// Lanes f(i, class of row first + i), f(i, 0) where a row is ignored or missing.
template <typename T, typename P, typename F>
inline Vec lanes_of_targets(const Run<T, P>& run, int64_t first, int64_t rows, const F& f) {
  const int64_t* y = run.y + first;
  if (run.all_valid && rows == kLanes) return lanes_of([&](int i) { return f(i, y[i]); });
  const auto class_or_0 = [&](int i) { return std::max<int64_t>(y[i], kIgnored + 1); };
  if (rows == kLanes) return lanes_of([&](int i) { return f(i, class_or_0(i)); });
  return lanes_of([&](int i) { return f(i, i < rows ? class_or_0(i) : 0); });
}

template <typename T, typename P>
[[gnu::noinline]] Vec each_target_weight(const Run<T, P>& run, int64_t first, int64_t rows) {
  return lanes_of([&](int i) { return i < rows ? target_weight(run, run.y[first + i]) : 0.0f; });
}
template <typename T, typename P>
inline Vec tile_target_weights(const Run<T, P>& run, int64_t first, int64_t rows) {
  if (run.weight) return each_target_weight(run, first, rows);
  if (run.all_valid) return Vec::set(run.keep);
  return Vec::select(are_valid(run, first, rows), Vec::set(run.keep), Vec::zero());
}

// Rows from lane `from` on whose target has the first of the greatest logits, which are class c's
// at logits + c cls.
template <typename T, typename P, typename X>
int64_t tile_hits(const Run<T, P>& run, int64_t first, int64_t rows, int64_t from, const X* logits,
                  int64_t cls) {
  int64_t hits = 0;
  Vec best = Vec::load(logits), where = Vec::zero();
  auto nan = Vec::is_nan(best);
  for (int64_t c = 1; c < run.C; ++c) {
    const Vec x = Vec::load(logits + c * cls);
    where = Vec::select(Vec::greater(x, best), Vec::set(static_cast<float>(c)), where);
    best = Vec::max(x, best);
    nan = Vec::either(nan, Vec::is_nan(x));
  }
  float lanes[kLanes];
  Vec::select(nan, Vec::set(-2.0f), where).store(lanes);  // no class, nor kIgnored
  for (int64_t i = from; i < rows; ++i) hits += lanes[i] == static_cast<float>(run.y[first + i]);
  return hits;
}

// The gradient of each row at its own class, of probability p_y.
template <typename T, typename P>
[[gnu::noinline]] void write_targets(const Run<T, P>& run, int64_t first, int64_t rows,
                                     const Rows& r, Vec p_y) {
  Vec g_y = (r.q_sum + r.at_target) * p_y;
  if (run.uniform)
    g_y = g_y - lanes_of_targets(run, first, rows, [&](int, int64_t y) { return run.uniform[y]; });
  g_y = Vec::load(run.scale + first) * (g_y - r.at_target);
  float lanes[kLanes];
  g_y.store(lanes);
  T* grad = run.grad + first * run.grad_row;
  T nowhere;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = run.y[first + i];
    T* place = y == kIgnored ? &nowhere : grad + i * run.grad_row + y * run.grad_class;
    *place = static_cast<T>(lanes[i]);
  }
}

// The gradient of a tile's rows, of which `tile` holds a multiple of the probabilities:
// scale (Q p_c - q_c) = factor tile_c - scale q_c.
template <Spread kSpread, typename T, typename P>
void write_tile_gradient(const Run<T, P>& run, int64_t first, int64_t rows, const Rows& r,
                         Vec factor, Vec p_y, const Tiles<kSpread>& tiles) {
  const float *tile = tiles.x, *t_tile = tiles.t;
  const Vec scale = Vec::load(run.scale + first);
  const bool all_valid = run.prob || run.all_valid;
  const auto valid = all_valid ? Vec::first(kLanes) : are_valid(run, first, rows);
  const auto gradient = [&](int64_t c) {
    Vec g = factor * Vec::load(tile + c * kLanes);
    if constexpr (kSpread != Spread::kNone) g = g - scale * tile_q<kSpread>(run, t_tile, c);
    return Vec::select(valid, g, Vec::zero());  // zero even where the logits are NaN
  };
  unpack_tile(gradient, rows, run.C, run.grad + first * run.grad_row, run.grad_row, run.grad_class);
  if constexpr (kSpread != Spread::kProbabilities) write_targets(run, first, rows, r, p_y);
}

// Numbers that are added up one after the other; of more, each would round away more of the next.
constexpr int kSegment = 16;

// A sum of the sums of segments of classes, in segments itself.
struct LongSum {
  Vec whole, segment;
  int count;

  [[gnu::always_inline]] void add(Vec x) {
    segment = segment + x;
    if (++count < kSegment) return;
    whole = whole + segment, segment = Vec::zero(), count = 0;
  }
  [[gnu::always_inline]] Vec total() const { return whole + segment; }
};
[[gnu::always_inline]] inline LongSum long_sum() { return {Vec::zero(), Vec::zero(), 0}; }

// f(n, c) for all classes in [begin, end), n at a time, of which the exponentials go in step.
template <typename F>
[[gnu::always_inline]] inline void in_step(int64_t begin, int64_t end, const F& f) {
  int64_t c = begin;
  for (; c + kInStep <= end; c += kInStep) f(std::integral_constant<int, kInStep>{}, c);
  if (kInStep > 2 && c + 2 <= end) f(std::integral_constant<int, 2>{}, c), c += 2;
  for (; c < end; ++c) f(std::integral_constant<int, 1>{}, c);
}

// Of kLanes rows that lie side by side, without the maximum and straight from memory. False, and
// nothing is written, where that is not sure to serve (near_zero).
template <typename T>
bool forward_tile_near_zero(const Run<T>& run, int64_t first, int64_t from,
                            Tiles<Spread::kNone>* tiles, Rows* r) {
  const int64_t C = run.C, cls = run.x_class;
  const T* x = run.x + first;
  prefetch_tile(x, run.x_row, cls, C);
  const Vec zero = Vec::zero();
  LongSum sum = long_sum();
  Vec greatest = Vec::set(-std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < C; c += kSegment) {
    Vec part = zero;
    in_step(c, std::min(C, c + kSegment), [&](auto n, int64_t at) {
      Vec power[n];
      for (int k = 0; k < n; ++k) {
        power[k] = Vec::load(x + (at + k) * cls);
        greatest = Vec::max(power[k], greatest);
      }
      exp_each(power);
      for (int k = 0; k < n; ++k) {
        part = part + power[k];
        power[k].store(tiles->x + (at + k) * kLanes);
      }
    });
    sum.add(part);
  }
  const Vec total = sum.total(), inverse = Vec::set(1.0f) / total;
  const auto power = [&](int i, int64_t y) { return tiles->x[y * kLanes + i]; };
  const Vec p_y = lanes_of_targets(run, first, kLanes, power) * inverse;
  const Vec at_target = tile_target_weights(run, first, kLanes);
  const Vec of_row = Vec::load(run.scale + first) * at_target, factor = of_row * inverse;
  if (!near_zero(greatest, total, p_y)) return false;
  if (run.weight && run.grad && !keep_digits(factor, of_row)) return false;
  if (run.hits) *run.hits += tile_hits(run, first, kLanes, from, x, cls);
  *r = {zero, p_y, zero, zero, zero, zero - at_target};
  if (!run.grad) return true;
  const Rows target{zero, zero, zero, zero, zero, at_target};
  write_tile_gradient(run, first, kLanes, target, factor, p_y, *tiles);
  return true;
}

// Rows [first, first + rows); those before lane `from` have been counted already. Leaves the loss
// to finish_rows.
template <Spread kSpread, typename T, typename P>
Rows forward_tile(const Run<T, P>& run, int64_t first, int64_t rows, int64_t from,
                  Tiles<kSpread>* tiles) {
  float *tile = tiles->x, *t_tile = tiles->t;
  const int64_t C = run.C;
  const T* x = run.x + first * run.x_row;
  prefetch_tile(x, run.x_row, run.x_class, C);
  pack_tile(x, run.x_row, run.x_class, rows, C, tile);
  if (run.hits) *run.hits += tile_hits(run, first, rows, from, tile, kLanes);

  Rows r{Vec::load(tile), Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  for (int64_t c = 1; c < C; ++c) r.maximum = Vec::max(Vec::load(tile + c * kLanes), r.maximum);
  if constexpr (kSpread == Spread::kProbabilities) {
    pack_tile(run.t + first * run.t_row, run.t_row, run.t_class, rows, C, t_tile);
  } else {
    const auto x_y = [&](int i, int64_t y) { return tile[y * kLanes + i]; };
    r.below_y = lanes_of_targets(run, first, rows, x_y) - r.maximum;
    r.at_target = tile_target_weights(run, first, rows);
  }
  const auto add_classes = [&](auto n, int64_t c, Rows* sums) {
    Vec below[n], power[n];
    for (int k = 0; k < n; ++k)
      power[k] = below[k] = Vec::load(tile + (c + k) * kLanes) - r.maximum;
    exp_each(power);
    for (int k = 0; k < n; ++k) {
      sums->sum = sums->sum + power[k];
      power[k].store(tile + (c + k) * kLanes);
      if constexpr (kSpread != Spread::kNone) {
        const Vec q = tile_q<kSpread>(run, t_tile, c + k);
        sums->q_sum = sums->q_sum + q;
        sums->q_dot = sums->q_dot - q * below[k];
      }
    }
  };
  LongSum sum = long_sum(), q_sum = long_sum(), q_dot = long_sum();
  for (int64_t c = 0; c < C;) {
    const int64_t end = std::min(C, c + kSegment);
    Rows part;
    part.sum = part.q_sum = part.q_dot = Vec::zero();
    in_step(c, end, [&](auto n, int64_t at) { add_classes(n, at, &part); });
    sum.add(part.sum), q_sum.add(part.q_sum), q_dot.add(part.q_dot);
    c = end;
  }
  r.sum = sum.total(), r.q_sum = q_sum.total(), r.q_dot = q_dot.total();
  if (!run.grad) return r;
  const Vec inverse = Vec::set(1.0f) / r.sum;
  const Vec factor = Vec::load(run.scale + first) * (r.q_sum + r.at_target) * inverse;
  write_tile_gradient(run, first, rows, r, factor, exp(r.below_y) * inverse, *tiles);
  return r;
}

// The tiles from `row` to `end`; the last one may overlap the one before.
template <Spread kSpread, typename T, typename P>
void forward_tiles(const Run<T, P>& run, int64_t row, int64_t end, Rows* of_tile) {
  const int64_t rows = std::min<int64_t>(kLanes, run.rows);
  // One class has the probability 1, which its exponential times the inverse need not give.
  const bool side_by_side = rows == kLanes && run.x_row == 1 && run.C > 1 && !run.maximum;
  Tiles<kSpread> tiles(run.C);
  for (; row < end; row += kLanes) {
    const int64_t first = std::min(row, run.rows - rows);
    if constexpr (kSpread == Spread::kNone)
      if (side_by_side && forward_tile_near_zero(run, first, row - first, &tiles, of_tile)) {
        ++of_tile;
        continue;
      }
    *of_tile++ = forward_tile(run, first, rows, row - first, &tiles);
  }
}

template <Spread kSpread, typename T, typename P>
void backward_tile(const Run<T, P>& run, int64_t first, int64_t rows, Tiles<kSpread>* tiles) {
  float *tile = tiles->x, *t_tile = tiles->t;
  const int64_t C = run.C;
  const bool whole = rows == kLanes;
  const Vec maximum =
      whole ? Vec::load(run.maximum + first) : load_part(run.maximum + first, rows, 0);
  const Vec log_sum =
      whole ? Vec::load(run.log_sum + first) : load_part(run.log_sum + first, rows, 0);
  Rows r{maximum, Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  pack_tile(run.x + first * run.x_row, run.x_row, run.x_class, rows, C, tile);
  if constexpr (kSpread == Spread::kProbabilities) {
    pack_tile(run.t + first * run.t_row, run.t_row, run.t_class, rows, C, t_tile);
  } else {
    const auto x_y = [&](int i, int64_t y) { return tile[y * kLanes + i]; };
    r.below_y = lanes_of_targets(run, first, rows, x_y) - maximum;
    r.at_target = tile_target_weights(run, first, rows);
  }
  LongSum q_total = long_sum();
  for (int64_t c = 0; c < C;) {
    Vec q_sum = Vec::zero();
    for (const int64_t end = std::min(C, c + kSegment); c < end; ++c) {
      exp((Vec::load(tile + c * kLanes) - maximum) - log_sum).store(tile + c * kLanes);
      if constexpr (kSpread != Spread::kNone) q_sum = q_sum + tile_q<kSpread>(run, t_tile, c);
    }
    q_total.add(q_sum);
  }
  r.q_sum = q_total.total();
  const Vec factor = Vec::load(run.scale + first) * (r.q_sum + r.at_target);
  write_tile_gradient(run, first, rows, r, factor, exp(r.below_y - log_sum), *tiles);
}
