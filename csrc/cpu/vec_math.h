// exp, log, reductions and partial loads on top of Vec. Included after vec.h and vec_transpose.h in
// the same way: inside an ISA's namespace and target region, without an include guard.

constexpr int kLanes = Vec::kLanes;
constexpr unsigned kAllLanes = (1u << kLanes) - 1;  // as Vec::bits
// Vectors that go through exp in step. Sixteen registers hold the constants and one.
constexpr int kInStep = kLanes == 16 ? 4 : 1;

// 2^(i / kLanes) for each lane i, rounded, less the bits that root_power adds for i and the bias of
// the exponent; and what the rounded number lacks, as a part of it.
struct Roots {
  uint32_t bits[kLanes];
  float lacks[kLanes];
};
constexpr int kRootBits = kLanes == 16 ? 4 : 3;
constexpr Roots roots_of_2() {
  constexpr double kSixteenths[16] = {1.0,
                                      1.0442737824274138,
                                      1.0905077326652577,
                                      1.1387886347566916,
                                      1.189207115002721,
                                      1.241857812073484,
                                      1.2968395546510096,
                                      1.3542555469368927,
                                      1.4142135623730951,
                                      1.4768261459394993,
                                      1.5422108254079407,
                                      1.6104903319492543,
                                      1.681792830507429,
                                      1.7562521603732995,
                                      1.8340080864093424,
                                      1.9152065613971474};
  Roots roots{};
  for (int i = 0; i < kLanes; ++i) {
    const double exact = kSixteenths[i * 16 / kLanes];
    const float rounded = static_cast<float>(exact);
    roots.bits[i] =
        std::bit_cast<uint32_t>(rounded) - (((127u << kRootBits) + i) << (23 - kRootBits));
    roots.lacks[i] = static_cast<float>(exact / rounded - 1);
  }
  return roots;
}
alignas(64) constexpr Roots kRoots = roots_of_2();

// ---- whole vectors

#if defined(FASTCLS_AVX512)

// 2^(n / kLanes), rounded, and what it lacks, of a float whose lowest mantissa bits hold n + 127
// kLanes.
inline Vec root_power(Vec n) {
  const __m512i bits = _mm512_castps_si512(n.v);
  const __m512i root = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kRoots.bits));
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bits, 23 - kRootBits), root))};
}
inline Vec root_lacks(Vec n) {
  return {_mm512_permutexvar_ps(_mm512_castps_si512(n.v), _mm512_load_ps(kRoots.lacks))};
}
inline float reduce_sum(Vec x) { return _mm512_reduce_add_ps(x.v); }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x.v); }
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); counting exponents from sqrt(1/2) puts m there.
inline Vec split(Vec x, Vec* m) {
  const __m512i root = _mm512_set1_epi32(0x3f3504f3);
  const __m512i from_root = _mm512_sub_epi32(_mm512_castps_si512(x.v), root);
  const __m512i mantissa = _mm512_and_si512(from_root, _mm512_set1_epi32(0x007fffff));
  *m = {_mm512_castsi512_ps(_mm512_add_epi32(mantissa, root))};
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(from_root, 23))};
}
template <typename T>
inline void put(T* p, Vec x) {
  store16(p, x.v);
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

// 2^(n / kLanes), rounded, and what it lacks, of a float whose lowest mantissa bits hold n + 127
// kLanes.
inline Vec root_power(Vec n) {
  const __m256i bits = _mm256_castps_si256(n.v);
  const __m256i roots = _mm256_load_si256(reinterpret_cast<const __m256i*>(kRoots.bits));
  const __m256i root = _mm256_permutevar8x32_epi32(roots, bits);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 23 - kRootBits), root))};
}
inline Vec root_lacks(Vec n) {
  return {_mm256_permutevar8x32_ps(_mm256_load_ps(kRoots.lacks), _mm256_castps_si256(n.v))};
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
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); counting exponents from sqrt(1/2) puts m there.
inline Vec split(Vec x, Vec* m) {
  const __m256i root = _mm256_set1_epi32(0x3f3504f3);
  const __m256i from_root = _mm256_sub_epi32(_mm256_castps_si256(x.v), root);
  const __m256i mantissa = _mm256_and_si256(from_root, _mm256_set1_epi32(0x007fffff));
  *m = {_mm256_castsi256_ps(_mm256_add_epi32(mantissa, root))};
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(from_root, 23))};
}
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

// log(x) for x >= 1 and NaN. x = 2^e m with m in [sqrt(1/2), sqrt(2)), z = m - 1:
// log(x) = e ln 2 + z - z²/2 + z³ P(z). ln 2 comes in two parts, of which the first has zeros
// enough at its end for e ln2_high to be exact.
inline Vec log(Vec x) {
  constexpr float kP[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                          -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                          2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  Vec m;
  const Vec e = split(x, &m), z = m - Vec::set(1.0f), z2 = z * z;
  Vec p = Vec::set(kP[0]);
  for (int i = 1; i < 9; ++i) p = Vec::fma(p, z, Vec::set(kP[i]));
  Vec y = Vec::fma(e, Vec::set(-2.12194440e-4f), (z2 * z) * p);
  y = Vec::fma(Vec::set(-0.5f), z2, y);
  y = Vec::fma(e, Vec::set(0.693359375f), z + y);
  return Vec::select(Vec::is_nan(x), x, y);
}

// e^x in place for x <= 88, -inf and NaN; 0 below the smallest normal number. x = n ln 2 / kLanes +
// r with |r| <= ln 2 / (2 kLanes); e^x = 2^(n / kLanes) (1 + r + r² P(r)), where the power is a
// number of a table times one of 2. P has the least greatest relative error among polynomials of
// its degree: 1.6e-9 with 16 lanes and 1.7e-10 with 8, at most a fortieth of what rounding adds.
// Adding 1.5 * 2^23 + 127 kLanes rounds to a whole number and leaves n + 127 kLanes in the lowest
// bits. ln 2 as a float is off by 1.9e-9, which adds half an ulp of e^x where x is 20. The
// multiplying units are what limits it, and the table saves them three operations of nine (two of
// nine). The K vectors go in step, because with one chain of operations after the other the
// processor's queue is full of waiting ones before it meets the next chain.
template <int K>
[[gnu::always_inline]] inline void exp_each(Vec (&x)[K]) {
  constexpr bool kLong = kLanes == 8;
  constexpr float kP2 = kLong ? 5.00000012776e-1f : 5.00016173561e-1f;
  constexpr float kP3 = kLong ? 1.66680272329e-1f : 1.66667185107e-1f;
  constexpr float kP4 = 4.16604260603e-2f;
  const Vec shift = Vec::set(12582912.0f + 127.0f * kLanes);
  Vec power[K], r[K], p[K], r2[K];
  typename Vec::Mask normal[K];
  for (int i = 0; i < K; ++i)
    power[i] = Vec::fma(x[i], Vec::set(1.44269504088896341f * kLanes), shift);
  for (int i = 0; i < K; ++i)
    r[i] = Vec::fma(power[i] - shift, Vec::set(-0.693147180559945309f / kLanes), x[i]);
  for (int i = 0; i < K; ++i) normal[i] = Vec::not_less(x[i], Vec::set(-87.3365402f));
  for (int i = 0; i < K; ++i)
    p[i] = kLong ? Vec::fma(Vec::set(kP4), r[i], Vec::set(kP3)) : Vec::set(kP3);
  for (int i = 0; i < K; ++i) p[i] = Vec::fma(p[i], r[i], Vec::set(kP2));
  for (int i = 0; i < K; ++i) r2[i] = r[i] * r[i];
  for (int i = 0; i < K; ++i) r[i] = r[i] + root_lacks(power[i]);
  for (int i = 0; i < K; ++i) power[i] = root_power(power[i]);
  for (int i = 0; i < K; ++i) p[i] = Vec::fma(p[i], r2[i], r[i]);
  for (int i = 0; i < K; ++i) x[i] = Vec::fma_or_zero(normal[i], p[i], power[i], power[i]);
}

// The same for as many vectors as there are, in step where that pays.
template <int K>
[[gnu::always_inline]] inline void exp_in_step(Vec (&x)[K]) {
  if constexpr (kInStep > 1) {
    exp_each(x);
  } else {
    for (int i = 0; i < K; ++i) {
      Vec one[1] = {x[i]};
      exp_each(one);
      x[i] = one[0];
    }
  }
}

inline Vec exp(Vec x) {
  Vec one[1] = {x};
  exp_each(one);
  return one[0];
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
