// cross_entropy on the CPU: check, allocate, cut the rows into blocks, pick a kernel.
#include "ops.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/cross_entropy_fast.h"
#include "cpu/cross_entropy_plain.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cross_entropy_checks.h"
#include "dtypes.h"

namespace fastcls::cpu {

namespace {

using torch::stable::parallel_for;

// Sums go block by block, so that they do not depend on the number of threads. A block of rows and
// its targets fit the first-level cache where classes are few.
constexpr int64_t kBlockElements = 8192;
constexpr int64_t kMaxBlockRows = 512;
constexpr int64_t kLeastStridedRows = 32;
// Elements that are worth waking a thread for.
constexpr int64_t kThreadElements = 32768;
constexpr int64_t kOneThread = std::numeric_limits<int64_t>::max() / 2;

// Whole tiles of the kernels, where there is one. Of strided classes there always is, if there are
// so many rows: a class has neighbouring rows in one line of the cache.
int64_t block_rows(const RowLayout& layout) {
  const auto is_strided = [](int64_t stride) { return stride > 1; };
  const bool strided = std::ranges::any_of(layout.class_stride, is_strided);
  const int64_t rows = std::clamp(kBlockElements / std::max<int64_t>(layout.C, 1),
                                  strided ? kLeastStridedRows : 1, kMaxBlockRows);
  return rows < kPadding ? rows : rows / kPadding * kPadding;
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

// Appends the first three of a row's n numbers again, and again.
template <typename Acc>
void repeat_first(int64_t n, std::vector<Acc>* values) {
  for (int64_t i = 0; i < 3 && n > 0; ++i) values->push_back((*values)[i]);
}

// t's values as Acc in one run of memory, and the first three again.
template <typename Acc>
class FlatValues {
 public:
  explicit FlatValues(const std::optional<Tensor>& t) {
    if (!t) return;
    const Tensor flat = torch::stable::contiguous(*t);
    visit_floating(flat, [&](auto* data) {
      values_.reserve(flat.numel() + 3);
      values_.resize(flat.numel());
      std::transform(data, data + flat.numel(), values_.begin(),
                     [](auto value) { return static_cast<Acc>(value); });
    });
    repeat_first(flat.numel(), &values_);
  }
  const Acc* data() const { return values_.empty() ? nullptr : values_.data(); }

 private:
  std::vector<Acc> values_;
};

#include "cpu/cross_entropy_row_loops.h"

RowLoops row_loops() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return avx512::cross_entropy_kernels<float>().loops;
  if (isa() == Isa::kAvx2) return avx2::cross_entropy_kernels<float>().loops;
#endif
  return {&all_in_range, &copy_classes, &sum_of<float>};
}

double sum_of_losses(const float* losses, int64_t n) { return row_loops().sum(losses, n); }
double sum_of_losses(const double* losses, int64_t n) { return sum_of(losses, n); }

// Class indices are contiguous; probabilities are read through the layout's strides.
struct FlatTarget {
  const void* data;
  ScalarType type;
  bool prob;
};

// Everything about one call that does not change from block to block.
template <typename T, typename P, typename Acc>
struct Problem {
  RowLayout layout;
  FlatValues<Acc> weight;
  std::vector<Acc> uniform;
  RowRun<T, P, Acc> common{};  // pointers at row 0
  FlatTarget target;
  int64_t ignore_index;
  const int64_t* plain_classes = nullptr;  // the target itself, if that is what the kernels need

  Problem(const RowLayout& layout, const void* input, const FlatTarget& target,
          const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing)
      : layout(layout), weight(weight), target(target), ignore_index(ignore_index) {
    common.C = layout.C;
    common.x = static_cast<const T*>(input);
    common.x_class = layout.class_stride[kInput], common.x_row = layout.row_stride(kInput);
    common.prob = target.prob;
    common.t = target.prob ? static_cast<const P*>(target.data) : nullptr;
    common.t_class = layout.class_stride[kTarget], common.t_row = layout.row_stride(kTarget);
    common.grad_class = layout.class_stride[kGrad], common.grad_row = layout.row_stride(kGrad);
    common.weight = this->weight.data();
    common.keep = static_cast<Acc>(1 - smoothing);
    common.spread = static_cast<Acc>(smoothing / layout.C);
    if (smoothing > 0 && !target.prob) spread_uniformly();
    if (target.prob || (ignore_index >= 0 && ignore_index < layout.C)) return;
    if (target.type != ScalarType::Long) return;
    const int64_t* classes = static_cast<const int64_t*>(target.data);
    common.all_valid = row_loops().all_in_range(classes, layout.rows, layout.C);
    if (common.all_valid) plain_classes = classes;
  }

  // Puts the classes of rows [begin, begin + n) into run: the target's own memory where it can,
  // else copies in `y`, kIgnored where the target is ignore_index. Returns the sum of their
  // weights; `bad` becomes the first row whose target is out of range.
  double load_classes(int64_t begin, int64_t n, int64_t* y, RowRun<T, P, Acc>* run,
                      std::atomic<int64_t>* bad) const {
    if (common.prob) return n;
    run->y = plain_classes ? plain_classes + begin : y;
    const int64_t valid = plain_classes ? n : copy_to(begin, n, y, bad);
    if (!common.weight) return valid;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
      if (run->y[i] != kIgnored) sum += common.weight[run->y[i]];
    return sum;
  }

  // Calls f(run) for each run of equally spaced rows in [begin, begin + n). What `block` holds of
  // its rows, from `begin` on, is handed on to the runs.
  template <typename F>
  void for_each_run(int64_t begin, int64_t n, const RowRun<T, P, Acc>& block, const F& f) const {
    const int64_t length = layout.run();
    for (int64_t row = begin; row < begin + n;) {
      RowRun<T, P, Acc> run = block;
      run.rows = std::min(begin + n - row, length - row % length);
      run.y += row - begin, run.scale += row - begin;
      if (run.loss) run.loss += row - begin;
      if (run.maximum) run.maximum += row - begin, run.log_sum += row - begin;
      run.x += layout.offset(kInput, row);
      if (run.prob) run.t += layout.offset(kTarget, row);
      if (run.grad) run.grad += layout.offset(kGrad, row);
      f(run);
      row += run.rows;
    }
  }

 private:
  // Returns how many of them are not ignored.
  int64_t copy_to(int64_t begin, int64_t n, int64_t* y, std::atomic<int64_t>* bad) const {
    const int64_t* classes = y;
    if (target.type == ScalarType::Long) {
      classes = static_cast<const int64_t*>(target.data) + begin;
    } else {
      visit_index(target.type, target.data, [&](auto* data) {
        std::transform(data + begin, data + begin + n, y,
                       [](auto value) { return static_cast<int64_t>(value); });
      });
    }
    const int64_t valid = row_loops().copy_classes(classes, n, layout.C, ignore_index, y);
    return valid < 0 ? find_first_bad(begin, n, bad) : valid;
  }

  // `bad` becomes the first row in [begin, begin + n) whose target is out of range, unless it is
  // one before already. Returns 0.
  int64_t find_first_bad(int64_t begin, int64_t n, std::atomic<int64_t>* bad) const {
    visit_index(target.type, target.data, [&](auto* data) {
      const auto is_bad = [&](auto value) {
        const int64_t y = static_cast<int64_t>(value);
        return y != ignore_index && (y < 0 || y >= layout.C);
      };
      const int64_t row = std::find_if(data + begin, data + begin + n, is_bad) - data;
      int64_t first = bad->load();
      while (row < first && !bad->compare_exchange_weak(first, row)) {
      }
    });
    return 0;
  }

  void spread_uniformly() {
    double sum = 0;
    for (int64_t c = 0; c < common.C; ++c) {
      uniform.push_back(common.spread * (common.weight ? common.weight[c] : Acc(1)));
      sum += uniform.back();
    }
    repeat_first(common.C, &uniform);
    common.uniform = uniform.data();
    common.uniform_sum = static_cast<Acc>(sum);
  }
};

int64_t number_of_blocks(const RowLayout& layout) {
  const int64_t size = block_rows(layout);
  return (layout.rows + size - 1) / size;
}

// Calls f(block, first row, number of rows) for every block, on more threads than one where each
// gets `thread_elements` logits.
template <typename F>
void for_each_block(const RowLayout& layout, int64_t thread_elements, const F& f) {
  const int64_t size = block_rows(layout), blocks = number_of_blocks(layout);
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      f(block, block * size, std::min(size, layout.rows - block * size));
  };
  if (layout.rows * layout.C < 2 * thread_elements) return some(0, blocks);
  const int64_t per_block = std::max<int64_t>(size * layout.C, 1);
  parallel_for(0, blocks, std::max<int64_t>(thread_elements / per_block, 1), some);
}

#if defined(__x86_64__)
// Those of the instruction set in use, which is not kScalar.
template <typename T>
CrossEntropyKernels<T> fast_kernels() {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    if (isa() == Isa::kAvx512Bf16) return avx512_bf16::cross_entropy_kernels<T>();
  return isa() >= Isa::kAvx512 ? avx512::cross_entropy_kernels<T>()
                               : avx2::cross_entropy_kernels<T>();
}
#endif

template <typename T, typename P, typename Acc>
RowKernels<T, P, Acc> kernels_for(const RowRun<T, P, Acc>& run) {
#if defined(__x86_64__)
  if (isa() != Isa::kScalar && fast_path_serves(run)) {
    if constexpr (std::is_same_v<Acc, float> && std::is_same_v<T, P>)
      return fast_kernels<T>().own;
    else if constexpr (std::is_same_v<Acc, float> && std::is_same_v<P, float>)
      return fast_kernels<T>().wide;
  }
#endif
  return {forward_general<T, P, Acc>, backward_general<T, P, Acc>};
}

struct BlockSum {
  double loss = 0, weight = 0;
  int64_t hits = 0;
};

void throw_out_of_range(const FlatTarget& target, int64_t row, int64_t C) {
  std::string got;
  visit_index(target.type, target.data, [&](auto* data) { got = std::to_string(data[row]); });
  throw std::out_of_range(message("cross_entropy: target must be in [0, ", C,
                                  ") or ignore_index, got ", got, " in row ", row));
}

// What a forward pass writes; hits are in its result.
struct Outputs {
  void* loss;   // one number, or one per row
  bool wide;    // the loss is Acc, not T
  void* stats;  // [2 rows + 1] Acc, or null
  void* grad;   // logits' dtype and layout, or null
  bool count_hits;
};

// Puts values into out [begin, begin + n), of dtype Acc if `wide`, else T.
template <typename T, typename Acc>
void store_values(const Acc* values, int64_t n, void* out, bool wide, int64_t begin) {
  if (wide) {
    std::copy_n(values, n, static_cast<Acc*>(out) + begin);
  } else {
    std::transform(values, values + n, static_cast<T*>(out) + begin,
                   [](Acc value) { return static_cast<T>(value); });
  }
}

// Sum of the weights of all rows; `bad` becomes the first row whose target is out of range.
template <typename T, typename P, typename Acc>
double total_weight(const Problem<T, P, Acc>& problem, std::atomic<int64_t>* bad) {
  RowRun<T, P, Acc> block = problem.common;
  int64_t y[kMaxBlockRows];
  double sum = 0;
  for_each_block(problem.layout, kOneThread, [&](int64_t, int64_t begin, int64_t n) {
    sum += problem.load_classes(begin, n, y, &block, bad);
  });
  return sum;
}

// PyTorch's mean of rows without weight is NaN whatever their losses are: one part is 0 / 0.
double mean_divisor(double weight) {
  return weight == 0 ? std::numeric_limits<double>::quiet_NaN() : weight;
}

// Fills the outputs and returns the number of hits.
template <typename T, typename P, typename Acc>
int64_t forward(Problem<T, P, Acc>& problem, int64_t reduction, const Outputs& out) {
  const RowLayout& layout = problem.layout;
  problem.common.grad = static_cast<T*>(out.grad);
  if (out.grad) ask_for_huge_pages(out.grad, layout.rows * layout.C * sizeof(T));
  Acc* stats = static_cast<Acc*>(out.stats);
  std::vector<BlockSum> sums(number_of_blocks(layout));
  std::atomic<int64_t> bad{layout.rows};
  const bool divide = out.grad && reduction == kMean;
  const Acc unit =
      divide ? static_cast<Acc>(1 / mean_divisor(total_weight(problem, &bad))) : Acc(1);
  if (bad < layout.rows) throw_out_of_range(problem.target, bad, layout.C);
  const RowKernels<T, P, Acc> kernels = kernels_for(problem.common);
  for_each_block(layout, kThreadElements, [&](int64_t i, int64_t begin, int64_t n) {
    int64_t y[kMaxBlockRows];
    Acc losses[kMaxBlockRows + kPadding], scale[kMaxBlockRows + kPadding];
    std::fill_n(scale, n + kPadding, unit);
    RowRun<T, P, Acc> block = problem.common;
    block.loss = losses, block.scale = scale;
    if (out.count_hits) block.hits = &sums[i].hits;
    if (stats) block.maximum = stats + begin, block.log_sum = stats + layout.rows + begin;
    sums[i].weight = problem.load_classes(begin, n, y, &block, &bad);
    problem.for_each_run(begin, n, block, kernels.forward);
    if (reduction == kNone) {
      store_values<T>(losses, n, out.loss, out.wide, begin);
    } else {
      sums[i].loss = sum_of_losses(losses, n);
    }
  });
  if (bad < layout.rows) throw_out_of_range(problem.target, bad, layout.C);
  BlockSum total;
  for (const BlockSum& sum : sums)
    total.loss += sum.loss, total.weight += sum.weight, total.hits += sum.hits;
  total.weight = mean_divisor(total.weight);
  if (layout.C == 0) total = {};  // no logits: sums are 0 and means NaN, as in PyTorch
  if (stats) stats[2 * layout.rows] = static_cast<Acc>(total.weight);
  if (reduction != kNone) {
    const Acc value = reduction == kMean ? total.loss / total.weight : total.loss;
    store_values<T>(&value, 1, out.loss, out.wide, 0);
  }
  return total.hits;
}

template <typename T, typename P, typename Acc>
void backward(const Problem<T, P, Acc>& problem, int64_t reduction, const Tensor& grad_loss,
              const Tensor& saved) {
  const RowLayout& layout = problem.layout;
  // Only read: the kernels' struct is shared with the forward pass, which writes them.
  Acc* save = const_cast<Acc*>(static_cast<const Acc*>(saved.const_data_ptr()));
  const FlatValues<Acc> grads(grad_loss);
  const RowKernels<T, P, Acc> kernels = kernels_for(problem.common);
  const Acc divisor = reduction == kMean ? save[2 * layout.rows] : Acc(1);
  for_each_block(layout, kThreadElements, [&](int64_t, int64_t begin, int64_t n) {
    int64_t y[kMaxBlockRows];
    Acc scale[kMaxBlockRows + kPadding] = {};
    std::atomic<int64_t> bad{layout.rows};
    RowRun<T, P, Acc> block = problem.common;
    problem.load_classes(begin, n, y, &block, &bad);
    if (reduction == kNone) {
      std::copy_n(grads.data() + begin, n, scale);
    } else {
      std::fill_n(scale, n, grads.data()[0] / divisor);
    }
    block.scale = scale;
    block.maximum = save + begin, block.log_sum = save + layout.rows + begin;
    problem.for_each_run(begin, n, block, kernels.backward);
  });
}

// Index targets are read flat; probabilities through their strides.
Tensor flat_target(const CrossEntropyShape& s, const Tensor& target) {
  return s.prob ? target : torch::stable::contiguous(target);
}

void* data_or_null(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; }

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
  const Tensor loss = empty_flat(reduction == kNone ? s.batch : std::vector<int64_t>{},
                                 float_loss ? accumulate_type(type) : type, input);
  const Tensor saved = empty_saved(save, s.rows(), input);
  const Tensor hits = empty_hits(count_hits, input);
  const RowLayout layout =
      row_layout(op, s, {&input, s.prob ? &target : nullptr, save == kSaveGrad ? &saved : nullptr});
  const Tensor flat = flat_target(s, target);
  const FlatTarget classes{flat.const_data_ptr(), flat.scalar_type(), s.prob};
  const Outputs out{loss.mutable_data_ptr(), float_loss || type == accumulate_type(type),
                    data_or_null(saved, save == kSaveRows), data_or_null(saved, save == kSaveGrad),
                    count_hits};
  dispatch_types(type, s.prob ? target.scalar_type() : type, [&](auto t, auto p, auto acc) {
    Problem<decltype(t), decltype(p), decltype(acc)> problem(layout, input.const_data_ptr(),
                                                             classes, weight, ignore_index,
                                                             effective_smoothing(label_smoothing));
    const int64_t count = forward(problem, reduction, out);
    if (count_hits) *static_cast<int64_t*>(hits.mutable_data_ptr()) = count;
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
  const Tensor grad = with_huge_pages(new_like(input));
  const RowLayout layout = row_layout(op, s, {&input, s.prob ? &target : nullptr, &grad});
  if (grad.numel() == 0) return grad;
  const Tensor flat = flat_target(s, target);
  const ScalarType type = input.scalar_type();
  dispatch_types(type, s.prob ? target.scalar_type() : type, [&](auto t, auto p, auto acc) {
    Problem<decltype(t), decltype(p), decltype(acc)> problem(
        layout, input.const_data_ptr(), {flat.const_data_ptr(), flat.scalar_type(), s.prob}, weight,
        ignore_index, effective_smoothing(label_smoothing));
    problem.common.grad = static_cast<decltype(t)*>(grad.mutable_data_ptr());
    backward(problem, reduction, grad_loss, saved);
  });
  return grad;
}

void cross_entropy_scale(const Tensor& grad, const Tensor& grad_loss, const Tensor& target,
                         int64_t ignore_index) {
  const CrossEntropyShape s = check_cross_entropy_scale(grad, grad_loss, target, ignore_index);
  const RowLayout layout = row_layout("cross_entropy_scale_", s, {&grad, nullptr, &grad});
  const Tensor flat = flat_target(s, target);
  dispatch_types(grad.scalar_type(), grad.scalar_type(), [&](auto t, auto, auto acc) {
    using T = decltype(t);
    const auto scale = FlatValues<decltype(acc)>(grad_loss).data()[0];
    if (scale == 1) return;
    visit_index(flat.scalar_type(), flat.const_data_ptr(), [&](auto* classes) {
      for (int64_t row = 0; row < layout.rows; ++row) {
        if (static_cast<int64_t>(classes[row]) == ignore_index) continue;
        T* x = static_cast<T*>(grad.mutable_data_ptr()) + layout.offset(kGrad, row);
        for (int64_t c = 0; c < layout.C; ++c) {
          T& value = x[c * layout.class_stride[kGrad]];
          value = static_cast<T>(value * scale);
        }
      }
    });
  });
}

void cross_entropy_plain(const PlainCrossEntropy& call) {
  RowLayout layout;  // contiguous [rows, C] throughout
  layout.rows = call.rows, layout.C = call.C, layout.dims = 1, layout.size[0] = call.rows;
  for (int k : {kInput, kGrad}) layout.stride[k][0] = call.C, layout.class_stride[k] = 1;
  const Outputs out{call.loss, call.wide_loss, nullptr, call.grad, false};
  dispatch_types(call.type, call.type, [&](auto t, auto p, auto acc) {
    Problem<decltype(t), decltype(p), decltype(acc)> problem(
        layout, call.input, {call.target, ScalarType::Long, false}, std::nullopt, call.ignore_index,
        effective_smoothing(call.label_smoothing));
    forward(problem, call.reduction, out);
  });
}

}  // namespace fastcls::cpu
