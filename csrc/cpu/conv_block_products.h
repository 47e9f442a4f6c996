// The innermost step of both backward passes of the conv block: sums += factors × rows, for rows of
// taps × input channels in memory and sums in registers; part of conv_block_kernels.h.
//
// Rows and factors are floats, or bfloat16 where the processor multiplies those in pairs. Two
// entries then go together: their rows interleave, element by element, into the pairs that one dot
// product takes. A bfloat16 input and gradient lose nothing by it; a float32 weight is rounded, as
// autocast rounds it for PyTorch's own layers. Numbers below 2^-126 count as 0.

#if defined(FASTCLS_AVX512_BF16)
using Operand = BFloat16;
constexpr int kEntries = 2;  // that go together
#else
using Operand = float;
constexpr int kEntries = 1;
#endif

constexpr bool kNarrow = !std::is_same_v<Operand, float>;  // operands lie beside their floats

// An address that is computed once: base plus index in each of many loads would make two operations
// of a multiply-add that reads memory.
template <typename E>
[[gnu::always_inline]] inline const E* in_register(const E* p) {
  asm("" : "+r"(p));
  return p;
}

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

[[gnu::always_inline]] inline Factors factors_of(const Operand* g) {
  int32_t both;
  std::memcpy(&both, g, sizeof both);
  return _mm512_set1_epi32(both);
}
// Of one entry; the other one's is 0.
[[gnu::always_inline]] inline Factors last_factor(const Operand* g) {
  return _mm512_set1_epi32(g->x);
}

[[gnu::always_inline]] inline void add_pairs(__m512i pairs, Factors g, Vec& sum) {
  sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)pairs, (__m512bh)g);
}

// Two vectors of sums come out in the order of in_pair_order; a last single one in memory's.
template <int kVecs>
[[gnu::always_inline]] inline void add_rows(const Rows& rows, Factors g, Vec* sum) {
  const Operand *a = rows.of[0], *b = rows.of[1];
#pragma GCC unroll 9
  for (int v = 0; v + 1 < kVecs; v += 2) {
    __m512i x = _mm512_loadu_si512(a + v * L), y = _mm512_loadu_si512(b + v * L);
    asm("" : "+v"(x), "+v"(y));  // loaded once, not once for each half
    add_pairs(_mm512_unpacklo_epi16(x, y), g, sum[v]);
    add_pairs(_mm512_unpackhi_epi16(x, y), g, sum[v + 1]);
  }
  if constexpr (kVecs % 2) {
    const auto last = [](const Operand* row) {
      return _mm512_cvtepu16_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + (kVecs - 1) * L)));
    };
    add_pairs(_mm512_or_si512(last(a), _mm512_slli_epi32(last(b), 16)), g, sum[kVecs - 1]);
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

// Operands of the floats at `wide` have memory of their own, `narrow`.
inline Operand* operands_of(float*, Operand* narrow) { return narrow; }
inline float* floats_for(Operand*, float* wide) { return wide; }
[[gnu::always_inline]] inline void store_operands(Vec x, Operand* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x.v));
}

// Writes whole pairs of vectors; what bfloat16 cannot hold is rounded.
inline void narrow(const float* from, int64_t n, Operand* to) {
  for (int64_t i = 0; i < n; i += 2 * L) {
    const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + L);
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

#else

using Factors = Vec;

[[gnu::always_inline]] inline Factors factors_of(const Operand* g) { return Vec::set(*g); }
[[gnu::always_inline]] inline Factors last_factor(const Operand* g) { return factors_of(g); }

template <int kVecs>
[[gnu::always_inline]] inline void add_rows(const Rows& rows, Factors g, Vec* sum) {
#pragma GCC unroll 18
  for (int v = 0; v < kVecs; ++v) sum[v] = Vec::fma(g, Vec::load(rows.of[0] + v * L), sum[v]);
}

template <typename F>
void for_elements_of_sums(int64_t vecs, const F& f) {
  for (int64_t i = 0; i < vecs * L; ++i) f(i, i);
}

// Floats are their own operands.
inline Operand* operands_of(float* wide, Operand*) { return wide; }
inline float* floats_for(Operand* to, float*) { return to; }
[[gnu::always_inline]] inline void store_operands(Vec x, Operand* to) { x.store(to); }
inline void narrow(const float*, int64_t, Operand*) {}

#endif
