// Softmax cross-entropy in plain loops: the meaning of the op. Serves every dtype (float64
// included), stride and target; the fast kernels are tested against it.
//
// For one row with logits x [C], maximum m and s = sum of exp(x - m):
//   log p_c = (x_c - m) - log s
//   loss    = -sum_c q_c log p_c
// where q is the target with its weights:
//   indices        q_c = keep w_y [c = y] + u_c,  u_c = w_c smoothing / C
//   probabilities  q_c = w_c (keep t_c + smoothing / C)
// with keep = 1 - smoothing and w = 1 where there is no weight. As d(log p_c)/d(x_k) = [c = k] -
// p_k,
//   d(loss)/d(x_k) = Q p_k - q_k,  Q = sum_c q_c.
// -inf logits need no special case: 0 * -inf gives NaN where PyTorch gives NaN.
// Sums over classes are double: one after the other in float, a thousand terms would lose digits.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastcls::cpu {

// `rows` rows at equal distances in memory. T: logits, P: probabilities, Acc: arithmetic.
template <typename T, typename P, typename Acc>
struct RowRun {
  int64_t rows, C;
  const T* x;  // [rows, C]
  int64_t x_row, x_class;
  bool prob;
  const int64_t* y;  // [rows] class, or kIgnored, unless prob
  bool all_valid;    // no row is ignored
  const P* t;        // [rows, C] if prob
  int64_t t_row, t_class;
  T* grad;  // [rows, C]; null if the forward pass is to write none
  int64_t grad_row, grad_class;
  const Acc* weight;   // [C], then the first three once more as if classes began anew; or null
  const Acc* uniform;  // u of an index target, likewise, or null without smoothing
  Acc uniform_sum;     // sum of u
  Acc keep;            // 1 - smoothing
  Acc spread;          // smoothing / C
  Acc* loss;           // [rows], forward only
  int64_t* hits;       // where to add the number of hits, or null; forward only
  Acc* maximum;        // [rows], or null if the forward pass is to save nothing
  Acc* log_sum;        // [rows], with maximum
  const Acc* scale;    // [rows] gradient of the result with respect to each row's loss, with grad
};

constexpr int64_t kIgnored = -1;

template <typename T, typename P, typename Acc>
Acc target_term(const RowRun<T, P, Acc>& run, const P* t, int64_t c) {
  const Acc q = run.keep * static_cast<Acc>(t[c * run.t_class]) + run.spread;
  return run.weight ? run.weight[c] * q : q;
}

// Writes the gradient of a row, given its maximum and the log of its sum.
template <typename T, typename P, typename Acc>
void gradient_row(const RowRun<T, P, Acc>& run, int64_t row, Acc m, Acc log_sum) {
  const T* x = run.x + row * run.x_row;
  const P* t = run.t + row * run.t_row;
  T* grad = run.grad + row * run.grad_row;
  const int64_t y = run.prob ? kIgnored : run.y[row];
  if (!run.prob && y == kIgnored) {  // zero even where the logits are NaN
    for (int64_t c = 0; c < run.C; ++c) grad[c * run.grad_class] = static_cast<T>(Acc(0));
    return;
  }
  const Acc scale = run.scale[row];
  const Acc at_target = run.prob ? Acc(0) : run.weight ? run.keep * run.weight[y] : run.keep;
  double q_total = at_target + run.uniform_sum;
  if (run.prob)
    for (int64_t c = 0; c < run.C; ++c) q_total += target_term(run, t, c);
  const Acc q_sum = static_cast<Acc>(q_total);
  for (int64_t c = 0; c < run.C; ++c) {
    const Acc p = std::exp((static_cast<Acc>(x[c * run.x_class]) - m) - log_sum);
    const Acc q = run.prob ? target_term(run, t, c) : run.uniform ? run.uniform[c] : Acc(0);
    const Acc hit = c == y ? at_target : Acc(0);
    grad[c * run.grad_class] = static_cast<T>(scale * ((q_sum * p - q) - hit));
  }
}

// Is the target's logit the first of the greatest? Not where a row is ignored or has a NaN.
template <typename T, typename P, typename Acc>
bool is_hit(const RowRun<T, P, Acc>& run, int64_t row) {
  const T* x = run.x + row * run.x_row;
  const int64_t y = run.y[row];
  if (y == kIgnored) return false;
  const Acc at_target = static_cast<Acc>(x[y * run.x_class]);
  for (int64_t c = 0; c < run.C; ++c) {
    const Acc value = static_cast<Acc>(x[c * run.x_class]);
    if (!(c < y ? value < at_target : value <= at_target)) return false;
  }
  return true;
}

template <typename T, typename P, typename Acc>
void forward_row(const RowRun<T, P, Acc>& run, int64_t row) {
  const T* x = run.x + row * run.x_row;
  Acc m = -std::numeric_limits<Acc>::infinity();
  for (int64_t c = 0; c < run.C; ++c) {
    const Acc value = static_cast<Acc>(x[c * run.x_class]);
    m = value > m ? value : m;
  }
  double sum = 0;
  for (int64_t c = 0; c < run.C; ++c) sum += std::exp(static_cast<Acc>(x[c * run.x_class]) - m);
  const Acc log_sum = static_cast<Acc>(std::log(sum));
  auto log_p = [&](int64_t c) { return (static_cast<Acc>(x[c * run.x_class]) - m) - log_sum; };

  double loss = 0;
  if (run.prob) {
    const P* t = run.t + row * run.t_row;
    for (int64_t c = 0; c < run.C; ++c) loss -= target_term(run, t, c) * log_p(c);
  } else if (const int64_t y = run.y[row]; y != kIgnored) {
    loss = -(run.weight ? run.keep * run.weight[y] : run.keep) * log_p(y);
    if (run.uniform)
      for (int64_t c = 0; c < run.C; ++c) loss -= run.uniform[c] * log_p(c);
  }
  run.loss[row] = static_cast<Acc>(loss);
  if (run.maximum) run.maximum[row] = m, run.log_sum[row] = log_sum;
  if (run.grad) gradient_row(run, row, m, log_sum);
  if (run.hits) *run.hits += is_hit(run, row);
}

template <typename T, typename P, typename Acc>
void forward_general(const RowRun<T, P, Acc>& run) {
  for (int64_t row = 0; row < run.rows; ++row) forward_row(run, row);
}

template <typename T, typename P, typename Acc>
void backward_general(const RowRun<T, P, Acc>& run) {
  for (int64_t row = 0; row < run.rows; ++row)
    gradient_row(run, row, run.maximum[row], run.log_sum[row]);
}

}  // namespace fastcls::cpu
