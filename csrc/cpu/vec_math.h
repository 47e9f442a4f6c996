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

inline Vec round(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
// x 2^n for whole n; 0 where the result would be smaller than the smallest normal number.
inline Vec scale_by_power(Vec x, Vec n) {
  const __mmask16 tiny = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
  const __m512 scaled = _mm512_scalef_ps(x.v, n.v);
  return {_mm512_mask_mov_ps(scaled, tiny, _mm512_setzero_ps())};
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

#else

inline Vec round(Vec x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x 2^n for whole n; 0 where the result would be smaller than the smallest normal number.
inline Vec scale_by_power(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  const __m256 tiny = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(tiny, _mm256_mul_ps(x.v, power))};
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

#endif

// e^x for x <= 0, -inf and NaN. x = n ln 2 + r with |r| <= ln 2 / 2; e^x = 2^n (1 + r + r² P(r)).
inline Vec exp(Vec x) {
  const Vec n = round(x * Vec::set(1.44269504088896341f));
  Vec r = Vec::fma(n, Vec::set(-0.693359375f), x);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set(5.0000001201e-1f));
  p = Vec::fma(p * r, r, r) + Vec::set(1.0f);
  return scale_by_power(p, n);
}

// p[0 … count), count < kLanes, the other lanes `fill`.
template <typename T>
inline Vec load_part(const T* p, int64_t count, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = fill;
  for (int64_t i = 0; i < count; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec::load(lanes);
}
template <typename T>
inline void store_part(T* p, int64_t count, Vec x) {
  float lanes[kLanes];
  x.store(lanes);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(lanes[i]);
}
