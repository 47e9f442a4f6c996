// The innermost step of both backward passes of the conv block: sums += factors × rows, for rows of
// taps × input channels in memory and sums in registers; part of conv_block_kernels.h.
//
// Of bfloat16, two entries go together: their rows interleave, element by element, into pairs.

constexpr int kEntries = kPerLane<Operand>;

struct Rows {
  const Operand* of[kEntries];
};
// The rows at address(0), address(1).
template <typename F>
[[gnu::always_inline]] inline Rows rows_at(const F& address) {
  Rows rows;
  for (int i = 0; i < kEntries; ++i) rows.of[i] = in_register(address(i));
  return rows;
}

#if defined(FASTCLS_AVX512_BF16)

using Factors = __m512i;

// Two vectors of sums come out in the order of in_pair_order; a last single one in memory's.
template <int kVecs>
[[gnu::always_inline]] inline void add_rows(const Rows& rows, Factors g, Vec* sum) {
  const Operand *a = rows.of[0], *b = rows.of[1];
#pragma GCC unroll 9
  for (int v = 0; v + 1 < kVecs; v += 2) {
    __m512i x = load_lanes(a + v * L), y = load_lanes(b + v * L);
    asm("" : "+v"(x), "+v"(y));  // loaded once, not once for each half
    add_product(_mm512_unpacklo_epi16(x, y), g, sum[v]);
    add_product(_mm512_unpackhi_epi16(x, y), g, sum[v + 1]);
  }
  if constexpr (kVecs % 2) {
    const auto last = [](const Operand* row) {
      return _mm512_cvtepu16_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + (kVecs - 1) * L)));
    };
    add_product(_mm512_or_si512(last(a), _mm512_slli_epi32(last(b), 16)), g, sum[kVecs - 1]);
  }
}

// Element of 2 L that lane i of the first of two vectors of sums, or lane i - L of the second, has:
// unpacking takes the lower or the upper four of each eight.
constexpr int64_t in_pair_order(int64_t i) { return i % L / 4 * 8 + i / L * 4 + i % 4; }

// Calls f(place in memory, place among the sums) for a row's elements.
template <typename F>
void for_elements_of_sums(int64_t vecs, const F& f) {
  for (int64_t i = 0; i < vecs * L; ++i) {
    const int64_t first = i / (2 * L) * 2 * L;
    f(first + 2 * L <= vecs * L ? first + in_pair_order(i - first) : i, i);
  }
}

#else

using Factors = Vec;

template <int kVecs>
[[gnu::always_inline]] inline void add_rows(const Rows& rows, Factors g, Vec* sum) {
#pragma GCC unroll 18
  for (int v = 0; v < kVecs; ++v) add_product(g, load_lanes(rows.of[0] + v * L), sum[v]);
}

template <typename F>
void for_elements_of_sums(int64_t vecs, const F& f) {
  for (int64_t i = 0; i < vecs * L; ++i) f(i, i);
}

#endif
