// Loops over numbers of rows, for the compiler to make vectors of. No include guard and no
// namespace: included once for every CPU, and once by each instruction set's source file in its own
// namespace and target region, with the same results.

// Are all classes in [0, C)? Where one is not, y or C - 1 - y has its highest bit set.
inline bool all_in_range(const int64_t* y, int64_t n, int64_t C) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; ++i)
    bits |= static_cast<uint64_t>(y[i]) | (static_cast<uint64_t>(C - 1) - y[i]);
  return bits >> 63 == 0;
}

// Copies classes to y, kIgnored where one is ignore_index or not in [0, C). Returns how many are
// left, or -1 if one that is not ignore_index is not in range. Without branches: nobody can
// foretell the classes.
inline int64_t copy_classes(const int64_t* classes, int64_t n, int64_t C, int64_t ignore_index,
                            int64_t* y) {
  int64_t left = 0, wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t outside = static_cast<uint64_t>(classes[i]) >= static_cast<uint64_t>(C);
    const int64_t ignored = classes[i] == ignore_index;
    y[i] = outside | ignored ? kIgnored : classes[i];
    left += 1 - (outside | ignored);
    wrong |= outside & ~ignored;
  }
  return wrong ? -1 : left;
}

// In sixteen sums, each waiting for its own last addition only.
template <typename Acc>
double sum_of(const Acc* values, int64_t n) {
  constexpr int kSums = 16;
  double sums[kSums] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += values[i + k];
  for (; i < n; ++i) sum += values[i];
  for (int k = 0; k < kSums; ++k) sum += sums[k];
  return sum;
}
