// Cross-entropy row by row, kLanes adjacent classes to a vector, for many classes. Part of
// cross_entropy_kernels.h.

// Calls f(i, c, ragged) for vectors of classes [c, c + kLanes), C >= kLanes, with accumulators
// i = 0 … 3 in turn. The last vector overlaps the one before where C is no multiple of kLanes: it
// alone is ragged, and its first lanes have been seen.
template <typename F>
inline void for_each_vector(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    for (int i = 0; i < 4; ++i) f(i, c + i * kLanes, std::false_type{});
  for (; c + kLanes <= C; c += kLanes) f(0, c, std::false_type{});
  if (c < C) f(1, C - kLanes, std::true_type{});
}

// The same for groups of vectors that go through exp in step: f(n, i, c, ragged), with n an
// integral_constant, for classes from c on and accumulators from i on, of the classes [c, C). The
// last vector of a ragged group is the ragged one.
template <typename F>
inline void for_each_group(int64_t c, int64_t C, const F& f) {
  constexpr std::integral_constant<int, kInStep> kWhole;
  constexpr std::integral_constant<int, 1> kOne;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    for (int i = 0; i < 4; i += kInStep) f(kWhole, i, c + i * kLanes, std::false_type{});
  if constexpr (kInStep == 1) {
    for (; c + kLanes <= C; c += kLanes) f(kOne, 0, c, std::false_type{});
    if (c < C) f(kOne, 1, c, std::true_type{});
  } else {
    const auto rest = [&](auto ragged) {
      const int64_t vectors = (C - c + kLanes - 1) / kLanes;
      if (vectors == 4) f(std::integral_constant<int, 4>{}, 0, c, ragged);
      if (vectors == 3) f(std::integral_constant<int, 3>{}, 0, c, ragged);
      if (vectors == 2) f(std::integral_constant<int, 2>{}, 0, c, ragged);
      if (vectors == 1) f(kOne, 0, c, ragged);
    };
    C % kLanes ? rest(std::true_type{}) : rest(std::false_type{});
  }
}

// The lanes of the ragged vector that no vector before it has.
inline Vec only_new(int64_t C, Vec x) {
  return Vec::select(Vec::first(kLanes - static_cast<int>(C % kLanes)), Vec::zero(), x);
}

// Constructors are written out: the compiler's own would be outside the ISA's target region, where
// vectors are returned in another way.
struct Sums {
  Vec of[4];
  Sums() {
    for (Vec& sum : of) sum = Vec::zero();
  }
  float total() const { return reduce_sum((of[0] + of[1]) + (of[2] + of[3])); }
};
struct Maxima {
  Vec of[4];
  Maxima() {
    for (Vec& most : of) most = Vec::set(-std::numeric_limits<float>::infinity());
  }
  void add(int i, Vec x) { of[i] = Vec::max(x, of[i]); }
  Vec lanes() const { return Vec::max(Vec::max(of[0], of[1]), Vec::max(of[2], of[3])); }
};

// q of the classes [c, c + kLanes) of a row with probabilities t.
template <Spread kSpread, typename T, typename P>
inline Vec class_q(const Run<T, P>& run, const P* t, int64_t c) {
  if constexpr (kSpread == Spread::kSmoothing) return Vec::load(run.uniform + c);
  const Vec q = Vec::fma(Vec::set(run.keep), Vec::load(t + c), Vec::set(run.spread));
  return run.weight ? q * Vec::load(run.weight + c) : q;
}

template <typename T, typename P>
float row_maximum(const Run<T, P>& run, const T* x) {
  Maxima most;
  for_each_vector(run.C, [&](int i, int64_t c, auto) { most.add(i, Vec::load(x + c)); });
  return reduce_max(most.lanes());
}

// What is subtracted from the logits: their maximum, or nothing, which is sure to serve as long as
// they are near 0 (near_zero); then the maximum is found on the way.
enum class Shift { kMaximum, kNone };

// The sums of one row; stores exp(x - maximum) in powers [C] unless that is null. The row that is
// `ahead` further on is asked for: while exponentials are calculated, memory would have nothing to
// do.
struct RowSums {
  float sum, q_sum, q_dot;
  Vec greatest;  // logits, by lane, without Shift::kMaximum
};

template <Spread kSpread, Shift kShift, bool kStore, typename T, typename P>
RowSums sum_classes(const Run<T, P>& run, int64_t row, int64_t ahead, float m, float* powers,
                    int64_t begin, int64_t end) {
  const T* x = run.x + row * run.x_row;
  const T* next = x + ahead * run.x_row;
  const P* t = run.t + row * run.t_row;
  const Vec maximum = Vec::set(m);
  Sums sum, q_sum, q_dot;
  Maxima most;
  for_each_group(begin, end, [&](auto n, int i, int64_t c, auto ragged) {
    const auto at = [&](int k) { return ragged && k == n - 1 ? run.C - kLanes : c + k * kLanes; };
    Vec below[n], power[n];
    for (int k = 0; k < n; ++k) __builtin_prefetch(next + c + k * kLanes);
    for (int k = 0; k < n; ++k) {
      power[k] = below[k] = Vec::load(x + at(k));
      if constexpr (kShift == Shift::kMaximum) power[k] = below[k] = below[k] - maximum;
      if constexpr (kShift == Shift::kNone) most.add(i + k, below[k]);
    }
    exp_each(power);
    for (int k = 0; k < n; ++k) {
      const bool overlaps = ragged && k == n - 1;
      if constexpr (kStore) power[k].store(powers + at(k));
      if (overlaps) power[k] = only_new(run.C, power[k]);
      sum.of[i + k] = sum.of[i + k] + power[k];
      if constexpr (kSpread != Spread::kNone) {
        Vec q = class_q<kSpread>(run, t, at(k)), product = q * below[k];
        if (overlaps) q = only_new(run.C, q), product = only_new(run.C, product);
        q_sum.of[i + k] = q_sum.of[i + k] + q;
        q_dot.of[i + k] = q_dot.of[i + k] - product;
      }
    }
  });
  if constexpr (kSpread == Spread::kNone) return {sum.total(), 0, 0, most.lanes()};
  return {sum.total(), q_sum.total(), q_dot.total(), most.lanes()};
}

// Of all classes, by segments as above, of vectors that four sums share.
constexpr int64_t kLongSegment = 16384;
template <Spread kSpread, Shift kShift, bool kStore, typename T, typename P>
RowSums sum_row(const Run<T, P>& run, int64_t row, int64_t ahead, float m, float* powers) {
  RowSums total{0, 0, 0, Maxima().lanes()};
  for (int64_t begin = 0; begin < run.C; begin += kLongSegment) {
    const int64_t end = std::min(run.C, begin + kLongSegment);
    const RowSums part =
        sum_classes<kSpread, kShift, kStore>(run, row, ahead, m, powers, begin, end);
    total.greatest = Vec::max(part.greatest, total.greatest);
    total.sum += part.sum, total.q_sum += part.q_sum, total.q_dot += part.q_dot;
  }
  return total;
}

// Writes factor source(c) - scale q_c for all c, and g_y at y. The ragged vector is calculated
// first: `source` may read what the others overwrite.
template <Spread kSpread, typename T, typename P, typename Source>
void write_row_gradient(const Run<T, P>& run, int64_t row, float factor, float g_y,
                        const Source& source) {
  const P* t = run.t + row * run.t_row;
  T* grad = run.grad + row * run.grad_row;
  const Vec factors = Vec::set(factor), scale = Vec::set(run.scale[row]);
  const auto gradient = [&](int64_t c) {
    Vec g = factors * source(c);
    if constexpr (kSpread != Spread::kNone) g = g - scale * class_q<kSpread>(run, t, c);
    return g;
  };
  const Vec last = gradient(run.C - kLanes);
  for_each_vector(run.C,
                  [&](int, int64_t c, auto ragged) { put(grad + c, ragged ? last : gradient(c)); });
  if (!run.prob) grad[run.y[row]] = static_cast<T>(g_y);
}

// scale ((Q p_y - u_y) - at_target)
template <typename T, typename P>
float gradient_at_target(const Run<T, P>& run, int64_t row, float q_sum, float p_y) {
  if (run.prob) return 0;
  const int64_t y = run.y[row];
  const float at_target = target_weight(run, y), u_y = run.uniform ? run.uniform[y] : 0.0f;
  return run.scale[row] * (((q_sum + at_target) * p_y - u_y) - at_target);
}

// The same as is_hit, where the maximum is known.
template <typename T, typename P>
bool row_is_hit(const Run<T, P>& run, int64_t row, float m, float sum) {
  const T* x = run.x + row * run.x_row;
  const int64_t y = run.y[row];
  if (!(sum < std::numeric_limits<float>::infinity())) return is_hit(run, row);  // NaN or +inf
  if (static_cast<float>(x[y]) != m) return false;
  const Vec maximum = Vec::set(m);
  int64_t c = 0;
  unsigned earlier = 0;
  for (; c + kLanes <= y; c += kLanes) earlier |= Vec::bits(Vec::equal(Vec::load(x + c), maximum));
  for (; c < y; ++c) earlier |= static_cast<float>(x[c]) == m;
  return earlier == 0;
}

// Numbers of up to kLanes rows. What is left to be done for their losses is as in Rows: there sum
// is `of_log`, at_target `at_loss`.
struct ClassRows {
  float maximum[kLanes] = {}, sum[kLanes] = {}, q_sum[kLanes] = {}, q_dot[kLanes] = {};
  float at_target[kLanes] = {};
  float of_log[kLanes] = {}, below_y[kLanes] = {}, at_loss[kLanes] = {};
};

// Without the maximum; false where that is not sure to serve.
template <bool kStore, typename T, typename P>
bool sum_near_zero(const Run<T, P>& run, int64_t row, int64_t ahead, float* powers, int64_t i,
                   ClassRows* r) {
  const int64_t y = run.y[row];
  const RowSums sums = sum_row<Spread::kNone, Shift::kNone, kStore>(run, row, ahead, 0, powers);
  float power_y[kLanes];
  if constexpr (kStore)
    power_y[0] = powers[y];
  else
    exp(Vec::set(static_cast<float>(run.x[row * run.x_row + y]))).store(power_y);
  const float p_y = power_y[0] / sums.sum;
  r->sum[i] = sums.sum, r->of_log[i] = p_y;
  r->at_target[i] = target_weight(run, y), r->at_loss[i] = -r->at_target[i];
  const auto fit = Vec::not_less(Vec::set(kGreatestLogit), sums.greatest);
  if (!(Vec::bits(fit) == kAllLanes && sums.sum > kLeastSum && p_y > kLeastProbability))
    return false;
  const float weight = run.scale[row] * r->at_target[i];
  if (run.weight && run.grad && !keep_digits(Vec::set(weight / sums.sum), Vec::set(weight)))
    return false;
  if (run.hits) *run.hits += row_is_hit(run, row, reduce_max(sums.greatest), sums.sum);
  return true;
}

template <Spread kSpread, bool kStore, typename T, typename P>
void sum_below_maximum(const Run<T, P>& run, int64_t row, int64_t ahead, float* powers, int64_t i,
                       ClassRows* r) {
  const float m = row_maximum(run, run.x + row * run.x_row);
  const RowSums sums = sum_row<kSpread, Shift::kMaximum, kStore>(run, row, ahead, m, powers);
  r->maximum[i] = m;
  r->sum[i] = r->of_log[i] = sums.sum, r->q_sum[i] = sums.q_sum, r->q_dot[i] = sums.q_dot;
  if (run.prob) return;
  const int64_t y = run.y[row];
  r->at_target[i] = r->at_loss[i] = target_weight(run, y);
  r->below_y[i] = static_cast<float>(run.x[row * run.x_row + y]) - m;
  if (run.hits) *run.hits += row_is_hit(run, row, m, sums.sum);
}

template <Spread kSpread, bool kStore, typename T, typename P>
void sum_class_row(const Run<T, P>& run, int64_t row, int64_t ahead, float* powers, int64_t i,
                   ClassRows* r) {
  if constexpr (kSpread == Spread::kNone)
    if (!run.maximum && sum_near_zero<kStore>(run, row, ahead, powers, i, r)) return;
  sum_below_maximum<kSpread, kStore>(run, row, ahead, powers, i, r);
}

// One step for all rows, then the next one: the sums across lanes at a step's end take their time,
// which the next row's beginning fills. `powers`: kLanes rows [C], if T is not float.
template <Spread kSpread, typename T, typename P>
void forward_by_class(const Run<T, P>& run, int64_t first, int64_t rows, float* powers) {
  ClassRows r;
  const auto class_of = [&](int64_t i) { return run.prob ? 0 : run.y[first + i]; };
  // Float gradients take the powers' place, vector by vector.
  const auto powers_of = [&](int64_t i) {
    if constexpr (std::is_same_v<T, float>) return run.grad + (first + i) * run.grad_row;
    return powers + i * run.C;
  };
  for (int64_t i = 0; i < rows; ++i) {
    if (class_of(i) == kIgnored) continue;
    if (run.grad)
      sum_class_row<kSpread, true>(run, first + i, rows, powers_of(i), i, &r);
    else
      sum_class_row<kSpread, false>(run, first + i, rows, nullptr, i, &r);
  }
  for (int64_t i = 0; i < rows && run.grad; ++i) {
    const int64_t row = first + i, y = class_of(i);
    if (y == kIgnored) {  // zero even where the logits are NaN
      std::fill_n(run.grad + row * run.grad_row, run.C, static_cast<T>(0.0f));
      continue;
    }
    const float* power = powers_of(i);
    const float g_y = gradient_at_target(run, row, r.q_sum[i], power[y] / r.sum[i]);
    const float factor = run.scale[row] * (r.q_sum[i] + r.at_target[i]) / r.sum[i];
    write_row_gradient<kSpread>(run, row, factor, g_y,
                                [&](int64_t c) { return Vec::load(power + c); });
  }
  const Rows losses{Vec::load(r.maximum), Vec::load(r.of_log),  Vec::load(r.q_sum),
                    Vec::load(r.q_dot),   Vec::load(r.below_y), Vec::load(r.at_loss)};
  finish_rows(run, &losses, 1, rows, [&](int64_t) { return first; });
}

template <Spread kSpread, typename T, typename P>
void backward_by_class(const Run<T, P>& run, int64_t row) {
  const T* x = run.x + row * run.x_row;
  const int64_t y = run.prob ? kIgnored : run.y[row];
  if (!run.prob && y == kIgnored) {  // zero even where the logits are NaN
    std::fill_n(run.grad + row * run.grad_row, run.C, static_cast<T>(0.0f));
    return;
  }
  const Vec m = Vec::set(run.maximum[row]), log_sum = Vec::set(run.log_sum[row]);
  float q_sum = run.prob ? 0 : run.uniform_sum;
  if constexpr (kSpread == Spread::kProbabilities) {
    const P* t = run.t + row * run.t_row;
    Sums sum;
    for_each_vector(run.C, [&](int i, int64_t c, auto ragged) {
      const Vec q = class_q<kSpread>(run, t, c);
      sum.of[i] = sum.of[i] + (ragged ? only_new(run.C, q) : q);
    });
    q_sum = sum.total();
  }
  const auto probability = [&](int64_t c) { return exp((Vec::load(x + c) - m) - log_sum); };
  float p_y = 0;
  if (!run.prob) {
    float lanes[kLanes];
    exp((Vec::set(static_cast<float>(x[y])) - m) - log_sum).store(lanes);
    p_y = lanes[0];
  }
  const float factor = run.scale[row] * (q_sum + (run.prob ? 0 : target_weight(run, y)));
  write_row_gradient<kSpread>(run, row, factor, gradient_at_target(run, row, q_sum, p_y),
                              probability);
}
