// Cross-entropy kernels over Vec; see cross_entropy_general.h for the maths. Included once per ISA,
// after vec.h and vec_math.h and in the same way.
//
//   by row     few classes, or strided ones: kLanes rows at once, one to a lane. Their logits are
//              transposed into a tile [C] of vectors, and no sum crosses lanes.
//   by class   many adjacent classes: one row at a time, kLanes classes to a vector.

// Up to here transposing is cheaper than the horizontal sums and ragged ends of "by class".
constexpr int64_t kFewClasses = 32;

template <typename T>
using Run = RowRun<T, T, float>;

// ---- by row

// Copies up to kLanes rows [rows, C] of any strides into tile [C][kLanes]. Lanes without a row are
// 0.
template <typename T>
void pack_tile(const T* x, int64_t row, int64_t cls, int64_t rows, int64_t C, float* tile) {
  if (row == 1 && rows == kLanes) {
    for (int64_t c = 0; c < C; ++c) Vec::load(x + c * cls).store(tile + c * kLanes);
    return;
  }
  if (cls == 1 && rows == kLanes && C >= 8) {
    for (int lane = 0; lane < kLanes; lane += 8)
      for (int64_t c = 0; c < C; c += 8) {
        const int64_t first = std::min(c, C - 8);  // the last block overlaps the one before
        __m256 r[8];
        for (int i = 0; i < 8; ++i) r[i] = load8(x + (lane + i) * row + first);
        transpose8(r);
        for (int i = 0; i < 8; ++i) store8(tile + (first + i) * kLanes + lane, r[i]);
      }
    return;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int lane = 0; lane < kLanes; ++lane)
      tile[c * kLanes + lane] = lane < rows ? static_cast<float>(x[lane * row + c * cls]) : 0.0f;
}

// The way back.
template <typename T>
void unpack_tile(const float* tile, int64_t rows, int64_t C, T* out, int64_t row, int64_t cls) {
  if (row == 1 && rows == kLanes) {
    for (int64_t c = 0; c < C; ++c) put(out + c * cls, Vec::load(tile + c * kLanes));
    return;
  }
  if (cls == 1 && rows == kLanes && C >= 8) {
    for (int lane = 0; lane < kLanes; lane += 8)
      for (int64_t c = 0; c < C; c += 8) {
        const int64_t first = std::min(c, C - 8);
        __m256 r[8];
        for (int i = 0; i < 8; ++i) r[i] = load8(tile + (first + i) * kLanes + lane);
        transpose8(r);
        for (int i = 0; i < 8; ++i) store8(out + (lane + i) * row + first, r[i]);
      }
    return;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t lane = 0; lane < rows; ++lane)
      out[lane * row + c * cls] = static_cast<T>(tile[c * kLanes + lane]);
}

// q of class c for kLanes rows; t is the tile of their probabilities.
template <typename T>
Vec tile_probability(const Run<T>& run, const float* t, int64_t c) {
  const Vec q = Vec::fma(Vec::set(run.keep), Vec::load(t + c * kLanes), Vec::set(run.spread));
  return run.weight ? Vec::set(run.weight[c]) * q : q;
}

// Weight of each lane's class, times keep; 0 where there is no row or it is ignored.
template <typename T>
void target_weights(const Run<T>& run, int64_t first, int64_t rows, float* at_target) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t y = lane < rows ? run.y[first + lane] : kIgnored;
    at_target[lane] = y == kIgnored ? 0.0f : run.weight ? run.keep * run.weight[y] : run.keep;
  }
}

template <typename T>
void forward_tile(const Run<T>& run, int64_t first, int64_t rows, float* tile, float* t_tile) {
  const int64_t C = run.C;
  pack_tile(run.x + first * run.x_row, run.x_row, run.x_class, rows, C, tile);
  Vec m = Vec::load(tile);
  for (int64_t c = 1; c < C; ++c) m = Vec::max(Vec::load(tile + c * kLanes), m);
  Vec sum = Vec::zero(), odd = Vec::zero();
  int64_t c = 0;
  for (; c + 1 < C; c += 2) {
    sum = sum + exp(Vec::load(tile + c * kLanes) - m);
    odd = odd + exp(Vec::load(tile + (c + 1) * kLanes) - m);
  }
  if (c < C) sum = sum + exp(Vec::load(tile + c * kLanes) - m);
  const Vec log_sum = log(sum + odd);

  // loss = sum of q (log_sum + m - x)
  Vec q_sum = Vec::zero(), q_dot = Vec::zero();
  if (run.prob) {
    pack_tile(run.t + first * run.t_row, run.t_row, run.t_class, rows, C, t_tile);
    for (c = 0; c < C; ++c) {
      const Vec q = tile_probability(run, t_tile, c);
      q_sum = q_sum + q;
      q_dot = Vec::fma(q, m - Vec::load(tile + c * kLanes), q_dot);
    }
  } else if (run.uniform) {
    q_sum = Vec::set(run.uniform_sum);
    for (c = 0; c < C; ++c)
      q_dot = Vec::fma(Vec::set(run.uniform[c]), m - Vec::load(tile + c * kLanes), q_dot);
  }
  Vec loss = Vec::fma(q_sum, log_sum, q_dot);
  float losses[kLanes], maxima[kLanes], log_sums[kLanes];
  if (!run.prob) {
    float at_target[kLanes], x_y[kLanes];
    target_weights(run, first, rows, at_target);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t y = lane < rows ? run.y[first + lane] : kIgnored;
      x_y[lane] = tile[(y == kIgnored ? 0 : y) * kLanes + lane];
    }
    loss = Vec::fma(Vec::load(at_target), log_sum - (Vec::load(x_y) - m), loss);
  }
  loss.store(losses), m.store(maxima), log_sum.store(log_sums);
  for (int64_t lane = 0; lane < rows; ++lane) {
    const bool ignored = !run.prob && run.y[first + lane] == kIgnored;
    run.loss[first + lane] = ignored ? 0.0f : losses[lane];
    if (run.maximum) {
      run.maximum[first + lane] = maxima[lane];
      run.log_sum[first + lane] = log_sums[lane];
    }
  }
}

template <typename T>
void backward_tile(const Run<T>& run, int64_t first, int64_t rows, float* tile, float* t_tile) {
  const int64_t C = run.C;
  pack_tile(run.x + first * run.x_row, run.x_row, run.x_class, rows, C, tile);
  const bool whole = rows == kLanes;
  const Vec m = whole ? Vec::load(run.maximum + first) : load_part(run.maximum + first, rows, 0);
  const Vec log_sum =
      whole ? Vec::load(run.log_sum + first) : load_part(run.log_sum + first, rows, 0);
  float at_target[kLanes] = {}, scales[kLanes] = {};
  Vec q_sum = Vec::set(run.uniform_sum);
  if (run.prob) {
    pack_tile(run.t + first * run.t_row, run.t_row, run.t_class, rows, C, t_tile);
    for (int64_t c = 0; c < C; ++c) q_sum = q_sum + tile_probability(run, t_tile, c);
  } else {
    target_weights(run, first, rows, at_target);
    q_sum = q_sum + Vec::load(at_target);
  }
  // Q p - q
  for (int64_t c = 0; c < C; ++c) {
    Vec g = q_sum * exp((Vec::load(tile + c * kLanes) - m) - log_sum);
    if (run.prob) g = g - tile_probability(run, t_tile, c);
    if (run.uniform) g = g - Vec::set(run.uniform[c]);
    g.store(tile + c * kLanes);
  }
  for (int64_t lane = 0; lane < rows; ++lane) {
    scales[lane] = run.scale[first + lane];
    if (run.prob) continue;
    const int64_t y = run.y[first + lane];
    if (y != kIgnored) {
      tile[y * kLanes + lane] -= at_target[lane];
      continue;
    }
    scales[lane] = 0;
    for (int64_t c = 0; c < C; ++c) tile[c * kLanes + lane] = 0;
  }
  const Vec scale = Vec::load(scales);
  for (int64_t c = 0; c < C; ++c) (scale * Vec::load(tile + c * kLanes)).store(tile + c * kLanes);
  unpack_tile(tile, rows, C, run.grad + first * run.grad_row, run.grad_row, run.grad_class);
}

// ---- by class

// Calls f(c, load) for every kLanes classes, where load(p, fill) gives lanes p[c …], those beyond
// the last class `fill`; `loops` vectors go to accumulators 0 … 3 in turn.
template <typename F>
inline void for_each_vector(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    for (int i = 0; i < 4; ++i) f(i, c + i * kLanes, int64_t{kLanes});
  for (; c < C; c += kLanes) f(0, c, std::min<int64_t>(C - c, kLanes));
}

template <typename T>
inline Vec load_some(const T* p, int64_t count, float fill) {
  return count == kLanes ? Vec::load(p) : load_part(p, count, fill);
}

// q of classes [c, c + count), 0 in the other lanes.
template <typename T>
inline Vec row_probability(const Run<T>& run, const T* t, int64_t c, int64_t count) {
  Vec q = Vec::fma(Vec::set(run.keep), load_some(t + c, count, 0), Vec::set(run.spread));
  if (run.weight) return q * load_some(run.weight + c, count, 0);
  if (count == kLanes) return q;
  float lanes[kLanes];
  q.store(lanes);
  return load_part(lanes, count, 0);
}

template <typename T>
void forward_by_class(const Run<T>& run, int64_t row) {
  const T* x = run.x + row * run.x_row;
  const T* t = run.t + row * run.t_row;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Vec most[4] = {Vec::set(kLowest), Vec::set(kLowest), Vec::set(kLowest), Vec::set(kLowest)};
  for_each_vector(run.C, [&](int i, int64_t c, int64_t count) {
    most[i] = Vec::max(load_some(x + c, count, kLowest), most[i]);
  });
  const float m = reduce_max(Vec::max(Vec::max(most[0], most[1]), Vec::max(most[2], most[3])));
  const Vec maximum = Vec::set(m);
  Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  for_each_vector(run.C, [&](int i, int64_t c, int64_t count) {
    sums[i] = sums[i] + exp(load_some(x + c, count, kLowest) - maximum);
  });
  const float log_sum = std::log(reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])));

  float loss = 0;
  if (run.prob || run.uniform) {
    Vec q_sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    Vec q_dot[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    for_each_vector(run.C, [&](int i, int64_t c, int64_t count) {
      const Vec q =
          run.prob ? row_probability(run, t, c, count) : load_some(run.uniform + c, count, 0);
      q_sum[i] = q_sum[i] + q;
      q_dot[i] = Vec::fma(q, maximum - load_some(x + c, count, m), q_dot[i]);
    });
    loss = reduce_sum((q_sum[0] + q_sum[1]) + (q_sum[2] + q_sum[3])) * log_sum +
           reduce_sum((q_dot[0] + q_dot[1]) + (q_dot[2] + q_dot[3]));
  }
  if (!run.prob) {
    const int64_t y = run.y[row];
    if (y == kIgnored) {
      loss = 0;
    } else {
      const float at_target = run.weight ? run.keep * run.weight[y] : run.keep;
      loss += at_target * (log_sum - (static_cast<float>(x[y]) - m));
    }
  }
  run.loss[row] = loss;
  if (run.maximum) run.maximum[row] = m, run.log_sum[row] = log_sum;
}

template <typename T>
void backward_by_class(const Run<T>& run, int64_t row) {
  const T* x = run.x + row * run.x_row;
  const T* t = run.t + row * run.t_row;
  T* grad = run.grad + row * run.grad_row;
  const int64_t y = run.prob ? kIgnored : run.y[row];
  if (!run.prob && y == kIgnored) {  // zero even where the logits are NaN
    std::fill_n(grad, run.C, static_cast<T>(0.0f));
    return;
  }
  const float at_target = run.prob ? 0.0f : run.weight ? run.keep * run.weight[y] : run.keep;
  float q_sum = at_target + run.uniform_sum;
  if (run.prob) {
    Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    for_each_vector(run.C, [&](int i, int64_t c, int64_t count) {
      sums[i] = sums[i] + row_probability(run, t, c, count);
    });
    q_sum = reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  const float scale = run.scale[row];
  const Vec m = Vec::set(run.maximum[row]), log_sum = Vec::set(run.log_sum[row]);
  const Vec scales = Vec::set(scale), factor = Vec::set(q_sum);
  for_each_vector(run.C, [&](int, int64_t c, int64_t count) {
    Vec g = factor * exp((load_some(x + c, count, 0) - m) - log_sum);
    if (run.prob) g = g - row_probability(run, t, c, count);
    if (run.uniform) g = g - load_some(run.uniform + c, count, 0);
    g = scales * g;
    count == kLanes ? put(grad + c, g) : store_part(grad + c, count, g);
  });
  if (run.prob) return;
  const float p = std::exp((static_cast<float>(x[y]) - run.maximum[row]) - run.log_sum[row]);
  const float q = run.uniform ? run.uniform[y] : 0.0f;
  grad[y] = static_cast<T>(scale * ((q_sum * p - q) - at_target));
}

// ---- entry points

template <typename T>
void forward_rows(const Run<T>& run) {
  if (run.C > kFewClasses && classes_are_adjacent(run)) {
    for (int64_t row = 0; row < run.rows; ++row) forward_by_class(run, row);
    return;
  }
  float tile[kMaxTileClasses * kLanes], t_tile[kMaxTileClasses * kLanes];
  for (int64_t row = 0; row < run.rows; row += kLanes)
    forward_tile(run, row, std::min<int64_t>(kLanes, run.rows - row), tile, t_tile);
}

template <typename T>
void backward_rows(const Run<T>& run) {
  if (run.C > kFewClasses && classes_are_adjacent(run)) {
    for (int64_t row = 0; row < run.rows; ++row) backward_by_class(run, row);
    return;
  }
  float tile[kMaxTileClasses * kLanes], t_tile[kMaxTileClasses * kLanes];
  for (int64_t row = 0; row < run.rows; row += kLanes)
    backward_tile(run, row, std::min<int64_t>(kLanes, run.rows - row), tile, t_tile);
}

template <typename T>
CrossEntropyKernels<T> cross_entropy_kernels() {
  return {&forward_rows<T>, &backward_rows<T>};
}
template CrossEntropyKernels<float> cross_entropy_kernels<float>();
template CrossEntropyKernels<BFloat16> cross_entropy_kernels<BFloat16>();
template CrossEntropyKernels<Half> cross_entropy_kernels<Half>();
