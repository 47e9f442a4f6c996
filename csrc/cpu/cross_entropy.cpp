// cross_entropy on the CPU: check, allocate, cut the rows into blocks, pick a kernel.
#include "ops.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/cross_entropy_fast.h"
#include "cpu/isa.h"
#include "dtypes.h"

namespace fastcls::cpu {

namespace {

using torch::stable::parallel_for;

// Sums go block by block, so that they do not depend on the number of threads. A block of rows and
// its targets fit the first-level cache where classes are few.
constexpr int64_t kBlockElements = 8192;
constexpr int64_t kMaxBlockRows = 512;
// Elements that are worth waking a thread for.
constexpr int64_t kThreadElements = 32768;

int64_t block_rows(int64_t C) {
  return std::clamp<int64_t>(kBlockElements / std::max<int64_t>(C, 1), 1, kMaxBlockRows);
}

// Calls f with a typed pointer to t's data; f gets nothing for other dtypes.
template <typename F>
void visit_floating(const Tensor& t, const F& f) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(static_cast<const double*>(data));
    case ScalarType::Float:
      return f(static_cast<const float*>(data));
    case ScalarType::BFloat16:
      return f(static_cast<const torch::headeronly::BFloat16*>(data));
    default:
      return f(static_cast<const torch::headeronly::Half*>(data));
  }
}

template <typename F>
void visit_index(ScalarType type, const void* data, const F& f) {
  switch (type) {
    case ScalarType::Byte:
      return f(static_cast<const uint8_t*>(data));
    case ScalarType::Char:
      return f(static_cast<const int8_t*>(data));
    case ScalarType::Short:
      return f(static_cast<const int16_t*>(data));
    case ScalarType::Int:
      return f(static_cast<const int32_t*>(data));
    case ScalarType::UInt16:
      return f(static_cast<const uint16_t*>(data));
    case ScalarType::UInt32:
      return f(static_cast<const uint32_t*>(data));
    case ScalarType::UInt64:
      return f(static_cast<const uint64_t*>(data));
    default:
      return f(static_cast<const int64_t*>(data));
  }
}

// t's values as Acc in one run of memory: t's own memory where it is that already.
template <typename Acc>
class FlatValues {
 public:
  explicit FlatValues(const std::optional<Tensor>& t) {
    if (!t) return;
    const Tensor flat = torch::stable::contiguous(*t);
    visit_floating(flat, [&](auto* data) {
      values_.resize(flat.numel());
      std::transform(data, data + flat.numel(), values_.begin(),
                     [](auto value) { return static_cast<Acc>(value); });
    });
  }
  const Acc* data() const { return values_.empty() ? nullptr : values_.data(); }

 private:
  std::vector<Acc> values_;
};

// Everything about one call that does not change from block to block.
template <typename T, typename P, typename Acc>
struct Problem {
  RowLayout layout;
  FlatValues<Acc> weight;
  std::vector<Acc> uniform;
  RowRun<T, P, Acc> common{};  // pointers at row 0
  const Tensor* target;        // contiguous if it holds indices
  int64_t ignore_index;

  Problem(const RowLayout& layout, const CrossEntropyShape& s, const Tensor& input,
          const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
          double smoothing)
      : layout(layout), weight(weight), target(&target), ignore_index(ignore_index) {
    common.C = s.C;
    common.x = static_cast<const T*>(input.const_data_ptr());
    common.x_class = layout.class_stride[kInput], common.x_row = layout.row_stride(kInput);
    common.prob = s.prob;
    common.t = s.prob ? static_cast<const P*>(target.const_data_ptr()) : nullptr;
    common.t_class = layout.class_stride[kTarget], common.t_row = layout.row_stride(kTarget);
    common.grad_class = layout.class_stride[kGrad], common.grad_row = layout.row_stride(kGrad);
    common.weight = this->weight.data();
    common.keep = static_cast<Acc>(1 - smoothing);
    common.spread = static_cast<Acc>(smoothing / s.C);
    if (smoothing > 0 && !s.prob) {
      double sum = 0;
      for (int64_t c = 0; c < s.C; ++c) {
        uniform.push_back(common.spread * (common.weight ? common.weight[c] : Acc(1)));
        sum += uniform.back();
      }
      common.uniform = uniform.data();
      common.uniform_sum = static_cast<Acc>(sum);
    }
  }

  // Classes of rows [begin, begin + n), kIgnored where the target is ignore_index. Returns the sum
  // of their weights; `bad` becomes the first row whose target is out of range.
  double load_classes(int64_t begin, int64_t n, int64_t* y, std::atomic<int64_t>* bad) const {
    double weight_sum = 0;
    visit_index(target->scalar_type(), target->const_data_ptr(), [&](auto* data) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t value = static_cast<int64_t>(data[begin + i]);
        y[i] = value;
        if (value == ignore_index) {
          y[i] = kIgnored;
        } else if (value < 0 || value >= layout.C) {
          y[i] = kIgnored;
          int64_t first = bad->load();
          while (begin + i < first && !bad->compare_exchange_weak(first, begin + i)) {
          }
        } else {
          weight_sum += common.weight ? common.weight[value] : Acc(1);
        }
      }
    });
    return weight_sum;
  }

  // Calls f(run, first row) for each run of equally spaced rows in [begin, begin + n).
  template <typename F>
  void for_each_run(int64_t begin, int64_t n, const F& f) const {
    const int64_t length = layout.run();
    for (int64_t row = begin; row < begin + n;) {
      RowRun<T, P, Acc> run = common;
      run.rows = std::min(begin + n - row, length - row % length);
      run.x += layout.offset(kInput, row);
      if (run.prob) run.t += layout.offset(kTarget, row);
      if (run.grad) run.grad += layout.offset(kGrad, row);
      f(run, row);
      row += run.rows;
    }
  }
};

// Calls f(block, first row, number of rows) for every block.
template <typename F>
void for_each_block(const RowLayout& layout, const F& f) {
  const int64_t size = block_rows(layout.C);
  const int64_t blocks = (layout.rows + size - 1) / size;
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      f(block, block * size, std::min(size, layout.rows - block * size));
  };
  if (layout.rows * layout.C < 2 * kThreadElements) return some(0, blocks);
  const int64_t per_block = std::max<int64_t>(size * layout.C, 1);
  parallel_for(0, blocks, std::max<int64_t>(kThreadElements / per_block, 1), some);
}

// The kernels that serve a run: those of the instruction set in use, or the general ones.
template <typename T, typename P, typename Acc>
struct Kernels {
  void (*forward)(const RowRun<T, P, Acc>&) = forward_general<T, P, Acc>;
  void (*backward)(const RowRun<T, P, Acc>&) = backward_general<T, P, Acc>;

  explicit Kernels(const RowRun<T, P, Acc>& run) {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, P> && std::is_same_v<Acc, float>) {
      if (!fast_path_serves(run)) return;
      if (isa() == Isa::kAvx512) use(avx512::cross_entropy_kernels<T>());
      if (isa() == Isa::kAvx2) use(avx2::cross_entropy_kernels<T>());
    }
#endif
  }

 private:
  template <typename Table>
  void use(const Table& table) {
    forward = table.forward, backward = table.backward;
  }
};

struct BlockSum {
  double loss = 0, weight = 0;
  int64_t hits = 0;
};

void throw_out_of_range(const Tensor& target, int64_t row, int64_t C) {
  std::string got;
  visit_index(target.scalar_type(), target.const_data_ptr(),
              [&](auto* data) { got = std::to_string(data[row]); });
  throw std::out_of_range(message("cross_entropy: target must be in [0, ", C,
                                  ") or ignore_index, got ", got, " in row ", row));
}

template <typename Loss, typename Acc>
void store_losses(const Acc* from, int64_t n, Tensor& loss, int64_t begin) {
  Loss* out = static_cast<Loss*>(loss.mutable_data_ptr()) + begin;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Loss>(from[i]);
}

// Sum of the weights of all rows; `bad` becomes the first row whose target is out of range.
template <typename T, typename P, typename Acc>
double total_weight(const Problem<T, P, Acc>& problem, std::atomic<int64_t>* bad) {
  if (problem.common.prob) return problem.layout.rows;
  double sum = 0;
  int64_t y[kMaxBlockRows];
  for (int64_t row = 0; row < problem.layout.rows; row += kMaxBlockRows)
    sum += problem.load_classes(row, std::min(kMaxBlockRows, problem.layout.rows - row), y, bad);
  return sum;
}

// Fills `loss` (one value per row, or their reduction), `saved` and `hits`.
template <typename T, typename P, typename Acc>
void forward(const Problem<T, P, Acc>& problem, int64_t reduction, int64_t save, Tensor& loss,
             Tensor& saved, Tensor& hits) {
  const RowLayout& layout = problem.layout;
  const bool float_loss = loss.scalar_type() == accumulate_type(loss.scalar_type());
  Acc* stats = save == kSaveRows ? static_cast<Acc*>(saved.mutable_data_ptr()) : nullptr;
  std::vector<BlockSum> sums((layout.rows + block_rows(layout.C) - 1) / block_rows(layout.C));
  std::atomic<int64_t> bad{layout.rows};
  const bool with_grad = save == kSaveGrad;
  Acc unit = 1;
  if (with_grad && reduction == kMean) unit = static_cast<Acc>(1 / total_weight(problem, &bad));
  const Kernels<T, P, Acc> kernels(problem.common);
  for_each_block(layout, [&](int64_t block, int64_t begin, int64_t n) {
    int64_t y[kMaxBlockRows];
    Acc losses[kMaxBlockRows], maxima[kMaxBlockRows], log_sums[kMaxBlockRows];
    Acc scale[kMaxBlockRows];
    std::fill_n(scale, n, unit);
    sums[block].weight = problem.common.prob ? n : problem.load_classes(begin, n, y, &bad);
    problem.for_each_run(begin, n, [&](RowRun<T, P, Acc>& run, int64_t row) {
      run.y = y + (row - begin);
      run.loss = losses + (row - begin);
      if (stats) run.maximum = stats + row, run.log_sum = stats + layout.rows + row;
      if (with_grad) run.maximum = maxima + (row - begin), run.log_sum = log_sums + (row - begin);
      run.scale = scale + (row - begin);
      kernels.forward(run);
      if (with_grad) kernels.backward(run);
      if (hits.defined())
        for (int64_t i = 0; i < run.rows; ++i) sums[block].hits += is_hit(run, i);
    });
    if (reduction != kNone) {
      for (int64_t i = 0; i < n; ++i) sums[block].loss += losses[i];
    } else if (float_loss) {
      store_losses<Acc>(losses, n, loss, begin);
    } else {
      store_losses<T>(losses, n, loss, begin);
    }
  });
  if (bad < layout.rows) throw_out_of_range(*problem.target, bad, layout.C);
  BlockSum total;
  for (const BlockSum& sum : sums) total.loss += sum.loss, total.weight += sum.weight;
  if (hits.defined()) {
    int64_t& count = *static_cast<int64_t*>(hits.mutable_data_ptr());
    count = 0;
    for (const BlockSum& sum : sums) count += layout.C ? sum.hits : 0;
  }
  if (layout.C == 0) total = {};  // no logits: sums are 0 and means NaN, as in PyTorch
  if (stats) stats[2 * layout.rows] = static_cast<Acc>(total.weight);
  if (reduction == kNone) return;
  const Acc value = static_cast<Acc>(reduction == kMean ? total.loss / total.weight : total.loss);
  float_loss ? store_losses<Acc>(&value, 1, loss, 0) : store_losses<T>(&value, 1, loss, 0);
}

template <typename T, typename P, typename Acc>
void backward(const Problem<T, P, Acc>& problem, int64_t reduction, const Tensor& grad_loss,
              const Tensor& saved) {
  const RowLayout& layout = problem.layout;
  // Only read: the kernels' struct is shared with the forward pass, which writes them.
  Acc* save = const_cast<Acc*>(static_cast<const Acc*>(saved.const_data_ptr()));
  const FlatValues<Acc> grads(grad_loss);
  const Kernels<T, P, Acc> kernels(problem.common);
  const Acc divisor = reduction == kMean ? save[2 * layout.rows] : Acc(1);
  for_each_block(layout, [&](int64_t, int64_t begin, int64_t n) {
    int64_t y[kMaxBlockRows];
    Acc scale[kMaxBlockRows];
    std::atomic<int64_t> bad{layout.rows};
    if (!problem.common.prob) problem.load_classes(begin, n, y, &bad);
    if (reduction == kNone) {
      std::copy_n(grads.data() + begin, n, scale);
    } else {
      std::fill_n(scale, n, grads.data()[0] / divisor);
    }
    problem.for_each_run(begin, n, [&](RowRun<T, P, Acc>& run, int64_t row) {
      run.y = y + (row - begin);
      run.scale = scale + (row - begin);
      run.maximum = save + row, run.log_sum = save + layout.rows + row;
      kernels.backward(run);
    });
  });
}

// Index targets are read flat; probabilities through their strides.
Tensor flat_target(const CrossEntropyShape& s, const Tensor& target) {
  return s.prob ? target : torch::stable::contiguous(target);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target,
                                                         const std::optional<Tensor>& weight,
                                                         int64_t ignore_index, int64_t reduction,
                                                         double label_smoothing, bool float_loss,
                                                         int64_t save, bool count_hits) {
  const char* op = "cross_entropy";
  const CrossEntropyShape s =
      check_cross_entropy(op, input, target, weight, ignore_index, reduction, label_smoothing);
  check_cross_entropy_outputs(op, s, save, count_hits);
  const ScalarType type = input.scalar_type();
  Tensor loss = empty_flat(reduction == kNone ? s.batch : std::vector<int64_t>{},
                           float_loss ? accumulate_type(type) : type, input);
  Tensor saved = empty_saved(save, s.rows(), input);
  Tensor hits = empty_hits(count_hits, input);
  const RowLayout layout =
      row_layout(op, s, {&input, s.prob ? &target : nullptr, save == kSaveGrad ? &saved : nullptr});
  const Tensor flat = flat_target(s, target);
  dispatch_types(type, s.prob ? target.scalar_type() : type, [&](auto t, auto p, auto acc) {
    Problem<decltype(t), decltype(p), decltype(acc)> problem(
        layout, s, input, flat, weight, ignore_index, effective_smoothing(label_smoothing));
    if (save == kSaveGrad)
      problem.common.grad = static_cast<decltype(t)*>(saved.mutable_data_ptr());
    forward(problem, reduction, save, loss, saved, hits);
  });
  return {loss, saved, hits};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              const std::optional<Tensor>& weight, const Tensor& saved,
                              int64_t ignore_index, int64_t reduction, double label_smoothing) {
  const char* op = "cross_entropy_backward";
  const CrossEntropyShape s =
      check_cross_entropy(op, input, target, weight, ignore_index, reduction, label_smoothing);
  check_cross_entropy_backward(s, grad_loss, input, saved, reduction);
  Tensor grad = new_like(input);
  const RowLayout layout = row_layout(op, s, {&input, s.prob ? &target : nullptr, &grad});
  if (grad.numel() == 0) return grad;
  const Tensor flat = flat_target(s, target);
  const ScalarType type = input.scalar_type();
  dispatch_types(type, s.prob ? target.scalar_type() : type, [&](auto t, auto p, auto acc) {
    Problem<decltype(t), decltype(p), decltype(acc)> problem(
        layout, s, input, flat, weight, ignore_index, effective_smoothing(label_smoothing));
    problem.common.grad = static_cast<decltype(t)*>(grad.mutable_data_ptr());
    backward(problem, reduction, grad_loss, saved);
  });
  return grad;
}

}  // namespace fastcls::cpu
