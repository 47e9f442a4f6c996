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
