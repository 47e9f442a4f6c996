// Cross-entropy kernels over Vec; see cross_entropy_general.h for the maths. Included once per ISA,
// after vec.h, vec_transpose.h and vec_math.h and in the same way; and once per dtype of the
// logits, FASTCLS_DTYPE, so that compilers share the work.
//
//   flat       index targets without smoothing, rows one after the other, up to 256 classes: kLanes
//              rows at once, their logits in vectors as they lie in memory.
//   quads      other targets of such rows, up to some 200 classes, and what flat can't do: kLanes
//              rows at once. A vector has four adjacent logits of every fourth row.
//   tile       other rows of few classes, or strided ones: kLanes rows at once, one to a lane of a
//              tile [C] of vectors, transposed or from side by side. No sum crosses lanes.
//   by class   many adjacent classes: kLanes classes of one row to a vector.
//
// All end in the same last step, the loss, and calculate each exponential once: it is kept until
// the row's sum is known.

// Only rows with probabilities have P, their dtype, other than T.
template <typename T, typename P = T>
using Run = RowRun<T, P, float>;

// What the target spreads over all classes: nothing, smoothing, or its probabilities.
enum class Spread { kNone, kSmoothing, kProbabilities };

// Of kLanes rows. Where maximum is 0, sum may also be p_y, below_y 0 and at_target negative:
// loss = -at_target log p_y.
struct Rows {
  Vec maximum, sum;  // greatest logit, and sum of exp(x - maximum)
  Vec q_sum, q_dot;  // of the classes that Spread reaches: sums of q and of q (maximum - x)
  Vec below_y;       // x_y - maximum
  Vec at_target;     // weight of the row's class, times keep
};

// The classes of rows [0, rows) as floats, kIgnored included; 0 in the other lanes.
inline Vec class_numbers(const int64_t* y, int64_t rows) {
#if defined(FASTCLS_AVX512)
  const auto mask = static_cast<__mmask16>((1u << rows) - 1);
  const __m512i low = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), y);
  const __m512i high = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask >> 8), y + 8);
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtepi64_ps(low)),
                             _mm512_cvtepi64_ps(high), 1)};
#else
  return lanes_of([&](int i) { return i < rows ? static_cast<float>(y[i]) : 0.0f; });
#endif
}

// Rows that are not ignored, of those from `first` on; and lanes without a row.
template <typename T, typename P>
inline typename Vec::Mask are_valid(const Run<T, P>& run, int64_t first, int64_t rows) {
  return Vec::not_less(class_numbers(run.y + first, rows), Vec::zero());
}

// at_target of one row; 0 where it is ignored.
template <typename T, typename P>
inline float target_weight(const Run<T, P>& run, int64_t y) {
  return y == kIgnored ? 0.0f : run.weight ? run.keep * run.weight[y] : run.keep;
}

// Rows are put side by side, one to a lane, in a tile of C vectors, which stays within the
// first-level cache up to here (16 KiB of AVX-512 vectors).
constexpr int64_t kMaxTileClasses = 256;

// Exponentials of the logits themselves save a pass for the maxima and keep p_y = exp(x_y) / sum as
// exact as with them, while no exponential overflows and neither the sum nor p_y gets near 0.
constexpr float kGreatestLogit = 60;   // exp(60) times a billion classes < 2^117
constexpr float kLeastSum = 0x1p-60f;  // far above what exp rounds to 0, 2^-126
constexpr float kLeastProbability = 0x1p-100f;
// Their factor in the gradient is weight / sum: within what float32 has, with digits, or exactly 0.
constexpr float kLeastFactor = 0x1p-110f, kGreatestFactor = 0x1p110f;

// Is that so in all lanes?
inline bool near_zero(Vec greatest, Vec sum, Vec p_y) {
  const auto enough = Vec::both(Vec::greater(p_y, Vec::set(kLeastProbability)),
                                Vec::greater(sum, Vec::set(kLeastSum)));
  const auto fit = Vec::not_less(Vec::set(kGreatestLogit), greatest);
  return Vec::bits(Vec::both(enough, fit)) == kAllLanes;
}

// Is weight / sum a number with the digits of its weight in all lanes?
inline bool keep_digits(Vec weight_by_sum, Vec weight) {
  const Vec zero = Vec::zero(), size = Vec::max(weight_by_sum, zero - weight_by_sum);
  const auto kept = Vec::both(Vec::greater(size, Vec::set(kLeastFactor)),
                              Vec::greater(Vec::set(kGreatestFactor), size));
  return Vec::bits(Vec::either(kept, Vec::equal(weight, zero))) == kAllLanes;
}

// The losses of several tiles are finished together: a logarithm alone would keep the processor
// waiting.
constexpr int kTilesInStep = 8;

template <typename T, typename P>
void save_rows(const Run<T, P>& run, int64_t first, int64_t rows, Vec maximum, Vec log_sum) {
  if (rows == kLanes) {
    maximum.store(run.maximum + first), log_sum.store(run.log_sum + first);
  } else {
    store_part(run.maximum + first, rows, maximum), store_part(run.log_sum + first, rows, log_sum);
  }
}

// loss = sum of q (log_sum + maximum - x), in tiles of `rows` rows from first_of(tile) on. What few
// calls need besides the losses has loops of its own: a call in a loop takes all vector registers.
template <typename T, typename P, typename F>
void finish_rows(const Run<T, P>& run, const Rows* of_tile, int64_t tiles, int64_t rows,
                 const F& first_of) {
  for (int64_t i = 0; i < tiles; ++i) {
    const Rows& r = of_tile[i];
    const Vec log_sum = log(r.sum), spread = Vec::fma(r.q_sum, log_sum, r.q_dot);
    Vec::fma(r.at_target, log_sum - r.below_y, spread).store(run.loss + first_of(i));
  }
  for (int64_t i = 0; i < tiles && !run.prob && !run.all_valid; ++i) {
    float* loss = run.loss + first_of(i);
    Vec::select(are_valid(run, first_of(i), rows), Vec::load(loss), Vec::zero()).store(loss);
  }
  for (int64_t i = 0; i < tiles && run.maximum; ++i)
    save_rows(run, first_of(i), rows, of_tile[i].maximum, log(of_tile[i].sum));
}

#include "cpu/cross_entropy_tile.h"

#include "cpu/cross_entropy_quads.h"

#include "cpu/cross_entropy_flat.h"

#include "cpu/cross_entropy_by_class.h"

// ---- entry points

// Up to here a tile is cheaper than the sums across lanes and the ragged ends of "by class". Quads,
// where they serve, are cheaper than both.
constexpr int64_t kFewClasses = kLanes == 16 ? 64 : 96;
constexpr int64_t kGroupedClasses = 512;

template <typename T, typename P>
bool use_tile(const Run<T, P>& run) {
  return run.C <= kFewClasses || !classes_are_adjacent(run);
}

template <Spread kSpread, typename T, typename P>
ForwardTiles<T, P> tiles_kernel(const Run<T, P>& run) {
  ForwardTiles<T, P> kernel = nullptr;
  if constexpr (kSpread == Spread::kNone) kernel = flat_kernel(run);
  if (!kernel) kernel = quads_kernel<kSpread>(run);
  return kernel || !use_tile(run) ? kernel : &forward_tiles<kSpread, T, P>;
}

template <Spread kSpread, typename T, typename P>
void forward_rows_with(const Run<T, P>& run) {
  const ForwardTiles<T, P> forward = tiles_kernel<kSpread>(run);
  if (!forward) {
    // Several rows' logits and powers together stay in the first-level cache up to here.
    const int64_t group = run.C <= kGroupedClasses ? kLanes : 1;
    std::vector<float> powers(run.grad && !std::is_same_v<T, float> ? group * run.C : 0);
    for (int64_t row = 0; row < run.rows; row += group)
      forward_by_class<kSpread>(run, row, std::min(group, run.rows - row), powers.data());
    return;
  }
  const int64_t rows = std::min<int64_t>(kLanes, run.rows);
  Rows of_tile[kTilesInStep];
  for (int64_t row = 0; row < run.rows; row += kTilesInStep * kLanes) {
    const int64_t end = std::min(run.rows, row + kTilesInStep * kLanes);
    forward(run, row, end, of_tile);
    const auto first_of = [&](int64_t i) { return std::min(row + i * kLanes, run.rows - rows); };
    finish_rows(run, of_tile, (end - row + kLanes - 1) / kLanes, rows, first_of);
  }
}

template <Spread kSpread, typename T, typename P>
void backward_rows_with(const Run<T, P>& run) {
  const bool as_tiles = use_tile(run);
  Tiles<kSpread> tiles(as_tiles ? run.C : 0);
  for (int64_t row = 0; row < run.rows; row += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, run.rows - row);
    if (as_tiles) {
      backward_tile(run, row, rows, &tiles);
    } else {
      for (int64_t i = 0; i < rows; ++i) backward_by_class<kSpread>(run, row + i);
    }
  }
}

// Calls f with the run's Spread, as a constant.
template <typename T, typename P, typename F>
void with_spread(const Run<T, P>& run, const F& f) {
  if constexpr (std::is_same_v<T, P>) {
    if (!run.prob && run.uniform) return f(std::integral_constant<Spread, Spread::kSmoothing>{});
    if (!run.prob) return f(std::integral_constant<Spread, Spread::kNone>{});
  }
  f(std::integral_constant<Spread, Spread::kProbabilities>{});
}

template <typename T, typename P>
void forward_rows(const Run<T, P>& run) {
  with_spread(run, [&](auto spread) { forward_rows_with<spread.value>(run); });
}

template <typename T, typename P>
void backward_rows(const Run<T, P>& run) {
  with_spread(run, [&](auto spread) { backward_rows_with<spread.value>(run); });
}

#include "cpu/cross_entropy_row_loops.h"

template <typename T>
CrossEntropyKernels<T> cross_entropy_kernels() {
  return {{&forward_rows<T, T>, &backward_rows<T, T>},
          {&forward_rows<T, float>, &backward_rows<T, float>},
          {&all_in_range, &copy_classes, &sum_of<float>}};
}
template CrossEntropyKernels<FASTCLS_DTYPE> cross_entropy_kernels<FASTCLS_DTYPE>();
