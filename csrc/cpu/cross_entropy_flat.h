// Cross-entropy of index targets, kLanes rows at once that follow each other in memory: a tile of C
// vectors as they lie there, without a look at where a row ends until its sum is taken. Part of
// cross_entropy_kernels.h.
//
// The exponentials are those of the logits themselves; tiles where that is not sure to serve are
// done again as quads, with maxima.

// exp(x) of n logits, a multiple of kLanes, in `powers`. Returns the greatest logits, by lane.
// Later logits are asked for: exponentials leave memory alone.
template <typename T>
[[gnu::always_inline]] inline Vec exponentials(const T* x, int64_t n, float* powers) {
  Vec greatest = Vec::set(-std::numeric_limits<float>::infinity());
  const auto step = [&](auto count, int64_t i) __attribute__((always_inline)) {
    Vec power[count];
    for (int k = 0; k < count; ++k) {
      __builtin_prefetch(x + i + k * kLanes + kAheadBytes / sizeof(T));
      power[k] = Vec::load(x + i + k * kLanes);
      greatest = Vec::max(power[k], greatest);
    }
    exp_each(power);
    for (int k = 0; k < count; ++k) power[k].store(powers + i + k * kLanes);
  };
  int64_t i = 0;
  for (; i + kInStep * kLanes <= n; i += kInStep * kLanes)
    step(std::integral_constant<int, kInStep>{}, i);
  for (; i < n; i += kLanes) step(std::integral_constant<int, 1>{}, i);
  return greatest;
}

// What a tile's gradient needs of its sums.
struct FlatRows {
  Vec power_y, sum;  // exp(x_y), sum of exp(x)
  Vec factor;        // of the exponentials
  Vec at_target;     // scale, times the weight of the row's class
  Vec targets;       // as numbers
};

// The place of each element of a tile: its row and its class.
template <int C>
struct FlatPlaces {
  int32_t row[C * kLanes];
  float cls[C * kLanes];
};
template <int C>
constexpr FlatPlaces<C> flat_places() {
  FlatPlaces<C> places{};
  for (int i = 0; i < C * kLanes; ++i) {
    places.row[i] = i / C;
    places.cls[i] = static_cast<float>(i % C);
  }
  return places;
}
template <int C>
alignas(64) constexpr FlatPlaces<C> kFlatPlaces = flat_places<C>();

// Up to kMostKnown classes, a number that the compiler knows: a vector has parts of several rows.
template <int C>
struct FewFlatClasses {
  using Quads = Classes<C, C % 4>;
  explicit FewFlatClasses(int64_t) {}
  static constexpr int64_t count() { return C; }

  [[gnu::always_inline]] static Vec sums(const float* powers) {
    const Quads quads{C};
    Vec tile[C];
    quads.load(powers, tile);
    auto sum = of_rows<Sum>(quads);
    quads.for_each_group([&](auto group) __attribute__((always_inline)) {
#pragma GCC unroll 5
      for (int k = 0; k < group.kSize; ++k) sum.add(group.place[k], tile[group.quad[k]]);
    });
    return sum.rows();
  }

  template <typename T>
  [[gnu::always_inline]] static void write_gradient(const float* powers, const int64_t*,
                                                    const FlatRows& flat, T* grad) {
    const Vec zero = Vec::zero();
    repeat<C>(C, [&](int64_t j) __attribute__((always_inline)) {
      const int32_t* row = kFlatPlaces<C>.row + j * kLanes;
      const auto hit =
          Vec::equal(pick_lanes(flat.targets, row), Vec::load(kFlatPlaces<C>.cls + j * kLanes));
      const Vec minus = Vec::select(hit, pick_lanes(flat.at_target, row), zero);
      put(grad + j * kLanes, pick_lanes(flat.factor, row) * Vec::load(powers + j * kLanes) - minus);
    });
  }
};

// More classes than a vector has lanes: a vector has parts of two rows at most.
template <int kPhase>
struct ManyFlatClasses {
  using Quads = Classes<0, kPhase>;
  int64_t C;
  explicit ManyFlatClasses(int64_t C) : C(C) {}
  int64_t count() const { return C; }

  // Reads up to kLanes - 1 powers behind the tile.
  [[gnu::always_inline]] Vec sums(const float* powers) const {
    const auto rest = Vec::first(static_cast<int>(C % kLanes));
    Vec sum[kLanes];
    for (int row = 0; row < kLanes; ++row) {
      const float* power = powers + row * C;
      Vec s = Vec::zero();
      int64_t c = 0;
      for (; c + kLanes <= C; c += kLanes) s = s + Vec::load(power + c);
      sum[row] = s + Vec::select(rest, Vec::load(power + c), Vec::zero());
    }
    return sum_lanes(sum);
  }

  template <typename T>
  [[gnu::always_inline]] void write_gradient(float* powers, const int64_t* y, const FlatRows& flat,
                                             T* grad) const {
    alignas(64) float at_y[kLanes], factors[kLanes + 1];
    (flat.power_y - flat.sum).store(at_y);  // p_y - 1, in multiples of the row's factor
    flat.factor.store(factors), factors[kLanes] = 0;
    for (int row = 0; row < kLanes; ++row)
      if (y[row] != kIgnored) powers[row * C + y[row]] = at_y[row];
    int64_t i = 0;
    for (int row = 0; row < kLanes; ++row) {
      const Vec own = Vec::set(factors[row]);
      const int64_t end = (row + 1) * C;
      for (; i + kLanes <= end; i += kLanes) put(grad + i, own * Vec::load(powers + i));
      if (i == end) continue;
      const auto first = Vec::first(static_cast<int>(end - i));
      const Vec both = Vec::select(first, own, Vec::set(factors[row + 1]));
      put(grad + i, both * Vec::load(powers + i)), i += kLanes;
    }
  }
};

template <typename K, typename T>
struct FlatTile {
  const Run<T>& run;
  K classes;
  int64_t first;
  float* powers;

  [[gnu::always_inline]] const T* x() const { return run.x + first * classes.count(); }

  // The rows' sums, as finish_rows wants them: loss = -weight log p_y. Are they to be trusted?
  // kPlain: no row is ignored, no class has a weight.
  template <bool kPlain>
  [[gnu::always_inline]] bool sum(Vec greatest, FlatRows* flat, Rows* r) const {
    const int64_t C = classes.count();
    const auto power = [&](int i, int64_t y) { return powers[i * C + y]; };
    const Vec zero = Vec::zero(), sum = classes.sums(powers), inverse = Vec::set(1.0f) / sum;
    const Vec power_y = kPlain ? lanes_of([&](int i) { return power(i, run.y[first + i]); })
                               : lanes_of_targets(run, first, kLanes, power);
    const Vec weight = kPlain ? Vec::set(run.keep) : each_target_weight(run, first, kLanes);
    const Vec p_y = power_y * inverse;
    *r = {zero, p_y, zero, zero, zero, zero - weight};
    const Vec targets = class_numbers(run.y + first, kLanes);
    Vec scale = Vec::load(run.scale + first);  // NaN where a mean has nothing to divide by
    if (!kPlain) scale = Vec::select(Vec::not_less(targets, zero), scale, zero);
    const Vec at_target = scale * weight;
    *flat = {power_y, sum, at_target * inverse, at_target, targets};
    if (!near_zero(greatest, sum, p_y)) return false;
    return kPlain || !run.grad || keep_digits(flat->factor, at_target);
  }

  [[gnu::always_inline]] void write_gradient(const FlatRows& flat) const {
    classes.write_gradient(powers, run.y + first, flat, run.grad + first * classes.count());
  }

  [[gnu::noinline]] void sum_as_quads(Rows* r) const {
    Run<T> tile = run;
    tile.hits = nullptr;
    forward_quads<Spread::kNone, typename K::Quads>(tile, first, first + kLanes, r);
  }
};

// `count` tiles from row `first` on, in steps like those of forward_quads. Hits are counted from
// lane `from` on.
template <typename K, typename T>
[[gnu::always_inline]] inline void forward_flat_tiles(const Run<T>& run, const K& classes,
                                                      int64_t first, int64_t count, int64_t from,
                                                      float* powers, Rows* of_tile) {
  FlatRows flat[kTilesInStep];
  Vec greatest[kTilesInStep];
  uint64_t unsure = 0;  // a bit for each tile
  const int64_t size = kLanes * classes.count();
  const auto tile = [&](int64_t i) __attribute__((always_inline)) {
    return FlatTile<K, T>{run, classes, first + i * kLanes, powers + i * size};
  };
  for (int64_t i = 0; i < count; ++i)
    greatest[i] = exponentials(tile(i).x(), size, powers + i * size);
  const auto sum = [&](auto plain, int64_t i) __attribute__((always_inline)) {
    const bool sure = tile(i).template sum<plain>(greatest[i], flat + i, of_tile + i);
    unsure |= static_cast<uint64_t>(!sure) << i;
  };
  if (run.all_valid && !run.weight) {
    for (int64_t i = 0; i < count; ++i) sum(std::true_type{}, i);
  } else {
    for (int64_t i = 0; i < count; ++i) sum(std::false_type{}, i);
  }
  for (int64_t i = 0; i < count && run.grad; ++i) tile(i).write_gradient(flat[i]);
  for (int64_t i = 0; unsure >> i; ++i)
    if (unsure >> i & 1) tile(i).sum_as_quads(of_tile + i);
  for (int64_t i = 0; i < count && run.hits; ++i)
    *run.hits += quad_hits<typename K::Quads>(run, tile(i).first, from, of_tile[i].sum);
}

template <typename K, typename T>
void forward_flat(const Run<T>& run, int64_t row, int64_t end, Rows* of_tile) {
  alignas(64) float powers[(kMaxTileClasses + 1) * kLanes];
  const K classes(run.C);
  const int64_t most = std::min<int64_t>(kTilesInStep, kMaxTileClasses / classes.count());
  while (row + kLanes <= end) {
    const int64_t count = std::min(most, (end - row) / kLanes);
    forward_flat_tiles(run, classes, row, count, 0, powers, of_tile);
    row += count * kLanes, of_tile += count;
  }
  if (row == end) return;
  const int64_t last = run.rows - kLanes;  // overlaps the tile before
  forward_flat_tiles(run, classes, last, 1, row - last, powers, of_tile);
}

template <typename T, int... kLess>
ForwardTiles<T> few_flat_kernel(int64_t C, std::integer_sequence<int, kLess...>) {
  constexpr ForwardTiles<T> kKernels[] = {&forward_flat<FewFlatClasses<kLess + 2>, T>...};
  return kKernels[C - 2];
}

// The kernel for contiguous rows of which no maxima are saved, or null.
template <typename T>
ForwardTiles<T> flat_kernel(const Run<T>& run) {
  const int64_t C = run.C;
  if (!in_tiles_as_they_lie(run) || run.maximum) return nullptr;
  if (C <= kMostKnown)
    return few_flat_kernel<T>(C, std::make_integer_sequence<int, kMostKnown - 1>{});
  if (C % 4 == 0) return &forward_flat<ManyFlatClasses<0>, T>;
  if (C % 4 == 1) return &forward_flat<ManyFlatClasses<1>, T>;
  if (C % 4 == 2) return &forward_flat<ManyFlatClasses<2>, T>;
  return &forward_flat<ManyFlatClasses<3>, T>;
}
