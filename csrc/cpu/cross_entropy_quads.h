// Cross-entropy of kLanes rows at once that follow each other in memory. Part of
// cross_entropy_kernels.h.
//
// Four rows are a block of C quads of four logits. Vector j of a tile has quad j of each of its
// kLanes / 4 blocks, one in a quarter of the vector (a half of AVX2's). What lies together in
// memory stays together, and the quads of a row are the same ones in every block:
//
//   C = 10   quad  0   1   2   3   4   5   6   7   8   9
//            rows  0   0  0|1  1   1   2   2  2|3  3   3
//
// Numbers by row, like the maxima, are vectors with row 4 q + i of the tile in lane i of quarter q.

// The rows of a block that a quad belongs to: its first `split` lanes are of `row`, the rest of the
// next one.
struct Place {
  int row, split;
};
constexpr int kWholeQuad = 4;

// Quads that go through one step together.
template <int kCount>
struct QuadGroup {
  static constexpr int kSize = kCount;
  int64_t quad[kCount];
  Place place[kCount];
};

// The quads that are left where each row has gone as many steps, as C / 4 times `quarters`, plus
// `offset`: those of two rows, and where C % 4 is 1 a whole one of the first and of the last row,
// which have one more than the others.
struct QuadsLeft {
  int count;
  int quarters[5], offset[5];
  Place place[5];
};
constexpr QuadsLeft quads_left(int phase) {
  QuadsLeft left{};
  const auto add = [&](int quarters, int offset, Place place) {
    left.quarters[left.count] = quarters, left.offset[left.count] = offset;
    left.place[left.count++] = place;
  };
  if (phase == 1) add(1, -1, {0, kWholeQuad});
  for (int row = 0; row < 3; ++row)
    if (const int split = (row + 1) * phase % 4) add(row + 1, (row + 1) * phase / 4, {row, split});
  if (phase == 1) add(4, 0, {3, kWholeQuad});
  return left;
}

// f(i) for i in [0, n), written out where n is known: kKnown, or -1.
template <int kKnown, int kFrom = 0, typename F>
[[gnu::always_inline]] inline void repeat(int64_t n, const F& f) {
  if constexpr (kKnown < 0) {
    for (int64_t i = 0; i < n; ++i) f(i);
  } else if constexpr (kFrom < kKnown) {
    f(kFrom);
    repeat<kKnown, kFrom + 1>(n, f);
  }
}

// A number of classes, at least 2, with C % 4 = kPhase; known to the compiler unless kKnown is 0.
template <int kKnown, int kPhase>
struct Classes {
  static constexpr int kMost = kKnown ? kKnown : kMaxTileClasses;
  static constexpr bool kIsKnown = kKnown > 0;
  static constexpr bool kOfHalves = kPhase == 2;  // quads of two rows have two lanes of each
  int64_t unknown;

  [[gnu::always_inline]] int64_t count() const { return kKnown ? kKnown : unknown; }

  // f(group) for all quads: up to five at once where their places are known, else in step one of
  // each row of the block, then those that are left.
  template <typename F>
  [[gnu::always_inline]] void for_each_group(const F& f) const {
    if constexpr (kIsKnown) {
      constexpr int kGroups = (kKnown + 4) / 5, kSize = kKnown / kGroups,
                    kLarger = kKnown % kGroups;
      repeat<kLarger>(0, [&](int i) __attribute__((always_inline)) {
        f(known_group<kSize + 1>(i * (kSize + 1)));
      });
      repeat<kGroups - kLarger>(0, [&](int i) __attribute__((always_inline)) {
        f(known_group<kSize>(kLarger + (kLarger + i) * kSize));
      });
      return;
    }
    constexpr int kExtra = kPhase == 1;
    constexpr QuadsLeft kLeft = quads_left(kPhase);
    const int64_t whole = count() / 4;
    repeat<-1>(whole - kExtra, [&](int64_t i) __attribute__((always_inline)) {
      QuadGroup<4> step;
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) {
        step.quad[row] = row * whole + (row * kPhase + 3) / 4 + i;
        step.place[row] = {row, kWholeQuad};
      }
      f(step);
    });
    if constexpr (kLeft.count > 0) {
      QuadGroup<kLeft.count> left;
#pragma GCC unroll 5
      for (int i = 0; i < kLeft.count; ++i) {
        left.quad[i] = kLeft.quarters[i] * whole + kLeft.offset[i];
        left.place[i] = kLeft.place[i];
      }
      f(left);
    }
  }

  template <int kCount>
  [[gnu::always_inline]] static QuadGroup<kCount> known_group(int quad) {
    QuadGroup<kCount> group;
#pragma GCC unroll 5
    for (int k = 0; k < kCount; ++k) {
      const int row = 4 * (quad + k) / kKnown, end = (row + 1) * kKnown;
      group.quad[k] = quad + k, group.place[k] = {row, std::min(4, end - 4 * (quad + k))};
    }
    return group;
  }

  // Between memory, x [kLanes, C], and a tile.
  template <typename T>
  [[gnu::always_inline]] void load(const T* x, Vec* tile) const {
    const int64_t C = count();
    repeat<kKnown ? kKnown / 2 : -1>(C / 2, [&](int64_t i) __attribute__((always_inline)) {
      load_quad_pair(x + 8 * i, 4 * C, tile + 2 * i, tile + 2 * i + 1);
    });
    if (C % 2) tile[C - 1] = load_quads(x + 4 * (C - 1), 4 * C);
  }
  template <typename T>
  [[gnu::always_inline]] void store(const Vec* tile, T* x) const {
    const int64_t C = count();
    repeat<kKnown ? kKnown / 2 : -1>(C / 2, [&](int64_t i) __attribute__((always_inline)) {
      store_quad_pair(x + 8 * i, 4 * C, tile[2 * i], tile[2 * i + 1]);
    });
    if (C % 2) store_quads(x + 4 * (C - 1), 4 * C, tile[C - 1]);
  }
};

// Numbers by row, where the quads of their rows are.
struct ByRow {
  Vec of[4];

  [[gnu::always_inline]] Vec at(Place place) const {
    if (place.split == kWholeQuad) return of[place.row];
    return Vec::select(quad_start(place.split), of[place.row], of[place.row + 1]);
  }
};
[[gnu::always_inline]] inline ByRow by_row(Vec rows) {
  return {{spread_lane<0>(rows), spread_lane<1>(rows), spread_lane<2>(rows), spread_lane<3>(rows)}};
}

struct Sum {
  static constexpr float kNothing = 0;
  [[gnu::always_inline]] Vec operator()(Vec x, Vec y) const { return x + y; }
};
struct Maximum {  // without NaN
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();
  [[gnu::always_inline]] Vec operator()(Vec x, Vec y) const { return Vec::max(x, y); }
};

// The sum, or maximum, of each row's numbers. Where the number of classes is known the first of
// them takes no operation.
template <typename Op, typename K>
struct OfRows {
  Vec of[4];
  bool empty[4];
  Vec halves[2];  // quads of rows 0 and 1, 2 and 3

  [[gnu::always_inline]] void add(Place place, Vec x) {
    if (place.split == kWholeQuad) return add_to(place.row, x);
    if constexpr (K::kOfHalves) {
      halves[place.row / 2] = x;
      return;
    }
    const auto start = quad_start(place.split);
    const Vec nothing = Vec::set(Op::kNothing);
    add_to(place.row, Vec::select(start, x, nothing));
    add_to(place.row + 1, Vec::select(start, nothing, x));
  }
  [[gnu::always_inline]] Vec rows() const {
    const Op op;
    if constexpr (!K::kOfHalves) return join_quads(of, op);
    const Vec ends = op(even_lanes(halves[0], halves[1]), odd_lanes(halves[0], halves[1]));
    return K::kMost == 2 ? ends : op(ends, join_quads(of, op));
  }

 private:
  [[gnu::always_inline]] void add_to(int row, Vec x) {
    of[row] = K::kIsKnown && empty[row] ? x : Op()(x, of[row]);
    empty[row] = false;
  }
};
template <typename Op, typename K>
[[gnu::always_inline]] inline OfRows<Op, K> of_rows(const K&) {
  const Vec nothing = Vec::set(Op::kNothing);
  return {{nothing, nothing, nothing, nothing}, {true, true, true, true}, {nothing, nothing}};
}

template <typename K>
[[gnu::always_inline]] inline Vec maxima(const K& classes, const Vec* tile) {
  auto most = of_rows<Maximum>(classes);
  classes.for_each_group([&](auto group) __attribute__((always_inline)) {
#pragma GCC unroll 5
    for (int k = 0; k < group.kSize; ++k) most.add(group.place[k], tile[group.quad[k]]);
  });
  return most.rows();
}

// 0, -1, -2, …: a block's places counted downwards, so that the first one is the greatest.
struct Places {
  float of[4 * kMaxTileClasses];
};
constexpr Places downward_places() {
  Places places{};
  for (int i = 0; i < 4 * kMaxTileClasses; ++i) places.of[i] = static_cast<float>(-i);
  return places;
}
alignas(64) constexpr Places kPlaces = downward_places();
inline Vec places_of(int64_t quad) { return repeat_quad(kPlaces.of + 4 * quad); }

// Up to here a row's own class is found by comparing every class with it: two operations a vector
// where there are mask registers, against some four for each row to go to memory one by one.
constexpr int64_t kComparedClasses = kLanes == 16 ? 32 : 0;

// Where the rows' targets are; in another row where a row is ignored.
inline Vec target_places(const int64_t* y, int64_t C) {
  const float c = static_cast<float>(-C);
  const float row_starts[4] = {0, c, 2 * c, 3 * c};
  return repeat_quad(row_starts) - class_numbers(y, kLanes);
}

// The number of rows from lane `from` on whose target has the first of the greatest logits. `sum`:
// NaN for rows with NaN or infinities, which are read once more.
template <typename K, typename T, typename P>
[[gnu::noinline]] int64_t quad_hits(const Run<T, P>& run, int64_t first, int64_t from, Vec sum) {
  const K classes{run.C};
  Vec tile[K::kMost];
  classes.load(run.x + first * classes.count(), tile);
  const ByRow maximum = by_row(maxima(classes, tile));
  const Vec none = Vec::set(Maximum::kNothing);
  auto where = of_rows<Maximum>(classes);
  classes.for_each_group([&](auto group) __attribute__((always_inline)) {
#pragma GCC unroll 5
    for (int k = 0; k < group.kSize; ++k) {
      const auto greatest = Vec::equal(tile[group.quad[k]], maximum.at(group.place[k]));
      where.add(group.place[k], Vec::select(greatest, places_of(group.quad[k]), none));
    }
  });
  const Vec target = target_places(run.y + first, classes.count());
  const unsigned counted = ~0u << from, unclear = Vec::bits(Vec::is_nan(sum)) & counted;
  const unsigned hits = Vec::bits(Vec::equal(where.rows(), target)) & counted;
  int64_t count = __builtin_popcount(hits & ~unclear);
  for (int i = 0; unclear >> i; ++i)
    if (unclear >> i & 1) count += is_hit(run, first + i);
  return count;
}

// q of a quad; t is the tile of the probabilities. A quad's classes go on with class 0.
template <Spread kSpread, typename T, typename P>
[[gnu::always_inline]] inline Vec quad_q(const Run<T, P>& run, const Vec* t, int64_t quad,
                                         Place place) {
  const int64_t c = 4 * quad - place.row * run.C;
  if constexpr (kSpread == Spread::kSmoothing) return repeat_quad(run.uniform + c);
  const Vec q = Vec::fma(Vec::set(run.keep), t[quad], Vec::set(run.spread));
  return run.weight ? repeat_quad(run.weight + c) * q : q;
}

// The gradient of ignored rows: zero even where the logits are NaN.
template <typename T, typename P>
[[gnu::noinline]] void clear_ignored(const Run<T, P>& run, int64_t first) {
  for (int64_t row = first; row < first + kLanes; ++row)
    if (run.y[row] == kIgnored) std::fill_n(run.grad + row * run.C, run.C, static_cast<T>(0.0f));
}

// A tile of kLanes rows from `first` on, in steps.
template <Spread kSpread, typename K, typename T, typename P>
struct QuadTile {
  static constexpr bool kIndex = kSpread != Spread::kProbabilities;
  const Run<T, P>& run;
  K classes;
  int64_t first;
  Vec *tile, *t;  // of logits, then their exponentials; of probabilities

  [[gnu::always_inline]] bool compared() const {
    return kIndex && classes.count() <= kComparedClasses;
  }
  [[gnu::always_inline]] const T* x() const { return run.x + first * classes.count(); }

  [[gnu::always_inline]] void load(Rows* r) const {
    const int64_t C = classes.count();
    classes.load(x(), tile);
    if constexpr (!kIndex) classes.load(run.t + first * C, t);
    r->maximum = maxima(classes, tile);
  }

  [[gnu::always_inline]] auto is_target() const {
    const int64_t C = classes.count();
    const ByRow targets = by_row(compared() ? target_places(run.y + first, C) : Vec::zero());
    return [targets](int64_t quad, Place place) __attribute__((always_inline)) {
      return Vec::equal(places_of(quad), targets.at(place));
    };
  }

  [[gnu::always_inline]] void sum(Rows* r) const {
    const Vec zero = Vec::zero();
    const ByRow maximum = by_row(r->maximum);
    const auto is_target_at = is_target();
    auto sum = of_rows<Sum>(classes), below_y = of_rows<Sum>(classes);
    auto q_sum = of_rows<Sum>(classes), q_dot = of_rows<Sum>(classes);
    classes.for_each_group([&](auto group) __attribute__((always_inline)) {
      Vec below[group.kSize], power[group.kSize];
#pragma GCC unroll 5
      for (int k = 0; k < group.kSize; ++k)
        power[k] = below[k] = tile[group.quad[k]] - maximum.at(group.place[k]);
      exp_in_step(power);
#pragma GCC unroll 5
      for (int k = 0; k < group.kSize; ++k) {
        const int64_t quad = group.quad[k];
        const Place place = group.place[k];
        tile[quad] = power[k];
        sum.add(place, power[k]);
        if (compared()) below_y.add(place, Vec::select(is_target_at(quad, place), below[k], zero));
        if constexpr (kSpread != Spread::kNone) {
          const Vec q = quad_q<kSpread>(run, t, quad, place);
          q_sum.add(place, q);
          q_dot.add(place, zero - q * below[k]);
        }
      }
    });
    r->sum = sum.rows();
    r->q_sum = r->q_dot = r->below_y = r->at_target = zero;
    if constexpr (kSpread != Spread::kNone) r->q_sum = q_sum.rows(), r->q_dot = q_dot.rows();
    if constexpr (kIndex) {
      const int64_t C = classes.count();
      const auto x_y = [&](int i, int64_t y) { return static_cast<float>(x()[i * C + y]); };
      r->below_y =
          compared() ? below_y.rows() : lanes_of_targets(run, first, kLanes, x_y) - r->maximum;
      r->at_target = tile_target_weights(run, first, kLanes);
    }
  }

  // scale (Q p_c - q_c), and for the target less scale at_target
  [[gnu::always_inline]] void write_gradient(const Rows& r) const {
    const Vec zero = Vec::zero(), scale = Vec::load(run.scale + first), minus = zero - scale;
    const ByRow minus_scale = by_row(minus), at_target = by_row(minus * r.at_target);
    const ByRow factor = by_row(scale * (r.q_sum + r.at_target) / r.sum);
    const auto is_target_at = is_target();
    classes.for_each_group([&](auto group) __attribute__((always_inline)) {
#pragma GCC unroll 5
      for (int k = 0; k < group.kSize; ++k) {
        const int64_t quad = group.quad[k];
        const Place place = group.place[k];
        Vec g = zero;
        if (compared()) g = Vec::select(is_target_at(quad, place), at_target.at(place), zero);
        if constexpr (kSpread != Spread::kNone)
          g = Vec::fma(minus_scale.at(place), quad_q<kSpread>(run, t, quad, place), g);
        tile[quad] = Vec::fma(factor.at(place), tile[quad], g);
      }
    });
    classes.store(tile, run.grad + first * classes.count());
    if constexpr (kIndex) {
      if (!compared()) write_targets(run, first, kLanes, r, exp(r.below_y) / r.sum);
      if (!run.all_valid) clear_ignored(run, first);
    }
  }
};

// Each step for several tiles, then the next one: a step ends in sums of four lanes and begins with
// their result, and the processor sees too few instructions ahead to begin another tile meanwhile.
template <Spread kSpread, typename K, typename T, typename P>
void forward_quads(const Run<T, P>& run, int64_t row, int64_t end, Rows* of_tile) {
  constexpr int kTiles = K::kIsKnown ? kTilesInStep : 1;
  Vec tiles[kTiles * K::kMost], t_tiles[kSpread == Spread::kProbabilities ? kTiles * K::kMost : 1];
  const K classes{run.C};
  const int64_t C = classes.count(), most = std::min<int64_t>(kTilesInStep, kMaxTileClasses / C);
  while (row < end) {
    const int64_t count = std::min(most, (end - row + kLanes - 1) / kLanes);
    const auto tile = [&](int64_t i) __attribute__((always_inline)) {
      const int64_t first = std::min(row + i * kLanes, run.rows - kLanes);
      return QuadTile<kSpread, K, T, P>{run, classes, first, tiles + i * C, t_tiles + i * C};
    };
    for (int64_t i = 0; i < count; ++i) tile(i).load(of_tile + i);
    for (int64_t i = 0; i < count; ++i) {
      // The next tiles are asked for while exponentials leave memory alone.
      const T* ahead = tile(i).x() + most * kLanes * C;
      for (int64_t e = 0; e < kLanes * C; e += 64 / sizeof(T)) __builtin_prefetch(ahead + e);
      tile(i).sum(of_tile + i);
    }
    for (int64_t i = 0; i < count && run.grad; ++i) tile(i).write_gradient(of_tile[i]);
    for (int64_t i = 0; i < count && run.hits; ++i) {
      const int64_t first = tile(i).first;
      *run.hits += quad_hits<K>(run, first, row + i * kLanes - first, of_tile[i].sum);
    }
    row += count * kLanes, of_tile += count;
  }
}

template <typename T, typename P = T>
using ForwardTiles = void (*)(const Run<T, P>& run, int64_t row, int64_t end, Rows* of_tile);

template <Spread kSpread, typename T, typename P, int... kLess>
ForwardTiles<T, P> known_kernel(int64_t C, std::integer_sequence<int, kLess...>) {
  constexpr ForwardTiles<T, P> kKernels[] = {
      &forward_quads<kSpread, Classes<kLess + 2, (kLess + 2) % 4>, T, P>...};
  return kKernels[C - 2];
}

// Up to so many classes have kernels of their own, up to twice as fast as those for any number, for
// index targets; for probabilities the other kind of tile is as fast as those.
constexpr int kMostKnown = 16;
// Above that "by class" takes no longer, as long as its rows are.
constexpr int kMostInQuads = kLanes == 16 ? 192 : kMaxTileClasses;

// Do the rows follow each other, as many as a tile has at least, and is a tile wide enough?
template <typename T, typename P>
bool in_tiles_as_they_lie(const Run<T, P>& run) {
  const int64_t C = run.C;
  const bool contiguous = classes_are_adjacent(run) && run.x_row == C &&
                          (!run.prob || run.t_row == C) && (!run.grad || run.grad_row == C);
  return contiguous && run.rows >= kLanes && C >= 2 && C <= kMaxTileClasses;
}

// The kernel for contiguous rows, or null where another one is to take them.
template <Spread kSpread, typename T, typename P>
ForwardTiles<T, P> quads_kernel(const Run<T, P>& run) {
  const int64_t C = run.C;
  if (!in_tiles_as_they_lie(run) || C > kMostInQuads) return nullptr;
  if (C <= kMostKnown) {
    constexpr std::make_integer_sequence<int, kMostKnown - 1> kLess;
    if constexpr (kSpread == Spread::kProbabilities)
      return nullptr;
    else
      return known_kernel<kSpread, T, P>(C, kLess);
  }
  if (C % 4 == 0) return &forward_quads<kSpread, Classes<0, 0>, T, P>;
  if (C % 4 == 1) return &forward_quads<kSpread, Classes<0, 1>, T, P>;
  if (C % 4 == 2) return &forward_quads<kSpread, Classes<0, 2>, T, P>;
  return &forward_quads<kSpread, Classes<0, 3>, T, P>;
}
