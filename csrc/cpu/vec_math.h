// exp, log, reductions and partial loads on top of Vec. Included after vec.h and vec_transpose.h in
// the same way: inside an ISA's namespace and target region, without an include guard.

constexpr int kLanes = Vec::kLanes;

// log(x) for x >= 1 and NaN. x = 2^e m with m in [sqrt(1/2), sqrt(2)), z = m - 1:
// log(x) = e ln 2 + z - z²/2 + z³ P(z). ln 2 comes in two parts, of which the first has zeros
// enough at its end for e ln2_high to be exact.
inline __m256 log8(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  // Counting exponents from sqrt(1/2) puts m into its interval.
  const __m256i from_root = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));
  const __m256 e = _mm256_cvtepi32_ps(_mm256_srai_epi32(from_root, 23));
  const __m256i mantissa = _mm256_and_si256(from_root, _mm256_set1_epi32(0x007fffff));
  const __m256 m = _mm256_castsi256_ps(_mm256_add_epi32(mantissa, _mm256_set1_epi32(0x3f3504f3)));
  const __m256 z = _mm256_sub_ps(m, _mm256_set1_ps(1.0f));
  constexpr float kP[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                          -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                          2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  __m256 p = _mm256_set1_ps(kP[0]);
  for (int i = 1; i < 9; ++i) p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(kP[i]));
  const __m256 z2 = _mm256_mul_ps(z, z);
  __m256 y = _mm256_mul_ps(_mm256_mul_ps(z2, z), p);
  y = _mm256_fmadd_ps(e, _mm256_set1_ps(-2.12194440e-4f), y);
  y = _mm256_fnmadd_ps(_mm256_set1_ps(0.5f), z2, y);
  y = _mm256_fmadd_ps(e, _mm256_set1_ps(0.693359375f), _mm256_add_ps(z, y));
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

// ---- whole vectors

#if defined(FASTCLS_AVX512)

// 2^n of a float whose lowest mantissa bits hold n + 127.
inline Vec power_of_low_bits(Vec x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
}
inline float reduce_sum(Vec x) { return _mm512_reduce_add_ps(x.v); }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x.v); }
inline Vec log(Vec x) {
  const __m256 low = log8(_mm512_castps512_ps256(x.v)), high = log8(_mm512_extractf32x8_ps(x.v, 1));
  return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
}
template <typename T>
inline void put(T* p, Vec x) {
  store8(p, _mm512_castps512_ps256(x.v));
  store8(p + 8, _mm512_extractf32x8_ps(x.v, 1));
}
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// Lanes f(0), f(1), …, put together in registers: a vector loaded right after its floats were
// stored would wait for all of them.
template <typename F>
inline Vec lanes_of(const F& f) {
  const __m256 low = _mm256_setr_ps(f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7));
  const __m256 high = _mm256_setr_ps(f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15));
  return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
}

#else

// 2^n of a float whose lowest mantissa bits hold n + 127.
inline Vec power_of_low_bits(Vec x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))};
}
inline float reduce_sum(Vec x) {
  __m128 v = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
inline float reduce_max(Vec x) {
  __m128 v = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
inline Vec log(Vec x) { return {log8(x.v)}; }
template <typename T>
inline void put(T* p, Vec x) {
  store8(p, x.v);
}
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
// Lanes f(0), f(1), …, put together in registers: a vector loaded right after its floats were
// stored would wait for all of them.
template <typename F>
inline Vec lanes_of(const F& f) {
  return {_mm256_setr_ps(f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7))};
}

#endif

// e^x for x <= 1, -inf and NaN; 0 below the smallest normal number. x = n ln 2 + r with
// |r| <= ln 2 / 2; e^x = 2^n (1 + r + r² P(r)). P has the least greatest relative error among
// polynomials of its degree: 3.2e-9, a twentieth of what rounding adds. Adding 1.5 * 2^23 + 127
// rounds to a whole number and leaves n + 127 in the lowest bits. Ten operations of the multiplying
// units, which are what limits it.
inline Vec exp(Vec x) {
  const Vec shift = Vec::set(12582912.0f + 127.0f);
  const Vec shifted = Vec::fma(x, Vec::set(1.44269504088896341f), shift);
  const Vec n = shifted - shift;
  Vec r = Vec::fma(n, Vec::set(-0.693359375f), x);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.3821654720e-3f);
  p = Vec::fma(p, r, Vec::set(8.3686923608e-3f));
  p = Vec::fma(p, r, Vec::set(4.1668262333e-2f));
  p = Vec::fma(p, r, Vec::set(1.6666521132e-1f));
  p = Vec::fma(p, r, Vec::set(4.9999994040e-1f));
  const Vec power = power_of_low_bits(shifted);
  const Vec y = Vec::fma(Vec::fma(p * r, r, r), power, power);
  return Vec::select(Vec::greater(Vec::set(-87.3365402f), x), Vec::zero(), y);
}

// p[0 … count), count < kLanes, the other lanes `fill`.
template <typename T>
inline Vec load_part(const T* p, int64_t count, float fill) {
  return lanes_of([&](int i) { return i < count ? static_cast<float>(p[i]) : fill; });
}
template <typename T>
inline void store_part(T* p, int64_t count, Vec x) {
  float lanes[kLanes];
  x.store(lanes);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(lanes[i]);
}
