// What the direct kernels and both backward passes multiply: floats, or bfloat16 where the
// processor multiplies it in pairs; part of conv_block_kernels.h.
//
// A pair is two neighbours in memory, and one lane of a vector of pairs; their products are summed
// in float. A bfloat16 input and gradient lose nothing by it; a float32 weight is rounded, as
// autocast rounds it for PyTorch's own layers. Numbers below 2^-126 count as 0.

constexpr int L = Vec::kLanes;

#if defined(FASTCLS_AVX512_BF16)
using Operand = BFloat16;
#else
using Operand = float;
#endif

template <typename E>
constexpr int kPerLane = 4 / sizeof(E);  // elements that a lane multiplies at once
constexpr bool kNarrow = !std::is_same_v<Operand, float>;  // operands lie beside their floats

// An address that is computed once: base plus index in each of many loads would make two operations
// of a multiply-add that reads memory.
template <typename E>
[[gnu::always_inline]] inline const E* in_register(const E* p) {
  asm("" : "+r"(p));
  return p;
}

// The same element, or pair, in every lane; last_factor: the other one of the pair is 0.
[[gnu::always_inline]] inline Vec factor_of(const float* p) { return Vec::set(*p); }
[[gnu::always_inline]] inline Vec last_factor(const float* p) { return Vec::set(*p); }
// An element, or pair, for each lane.
[[gnu::always_inline]] inline Vec load_lanes(const float* p) { return Vec::load(p); }
[[gnu::always_inline]] inline void add_product(Vec a, Vec b, Vec& sum) {
  sum = Vec::fma(a, b, sum);
}

// Floats are operands where they are; others of the floats at `wide` have a place of their own.
inline float* operands_of(float* wide, float*) { return wide; }
[[gnu::always_inline]] inline void store_operands(Vec x, float* to) { x.store(to); }

#if defined(FASTCLS_AVX512_BF16)

[[gnu::always_inline]] inline __m512i factor_of(const BFloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
[[gnu::always_inline]] inline __m512i last_factor(const BFloat16* p) {
  return _mm512_set1_epi32(p->x);
}
[[gnu::always_inline]] inline __m512i load_lanes(const BFloat16* p) {
  return _mm512_loadu_si512(p);
}
[[gnu::always_inline]] inline void add_product(__m512i a, __m512i b, Vec& sum) {
  sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b);
}

inline BFloat16* operands_of(float*, BFloat16* narrow) { return narrow; }
[[gnu::always_inline]] inline void store_operands(Vec x, BFloat16* to) { store16(to, x.v); }

#endif
