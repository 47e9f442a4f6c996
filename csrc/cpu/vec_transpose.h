// Loads and stores of eight floats, and 8 × 8 transposes, on every instruction set. Included after
// vec.h in the same way: inside an ISA's namespace and target region, without an include guard.

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Unsigned bytes as floats.
inline __m256 load8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

inline __m128i to_half(__m256 v, const Half*) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#if defined(FASTCLS_AVX512_BF16)
// Numbers below the smallest normal one become 0.
inline __m128i to_half(__m256 v, const BFloat16*) { return (__m128i)_mm256_cvtneps_pbh(v); }
inline __m256i to_half(__m512 v, const BFloat16*) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
// Rounds to nearest, ties to even: adds just under half of the last kept bit, and that bit.
inline __m128i to_half(__m256 v, const BFloat16*) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i words = _mm256_srli_epi32(result, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#endif
template <typename T>
inline void store8(T* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_half(v, p));
}

// r[i] lane j ↔ r[j] lane i.
inline void transpose8(__m256 (&r)[8]) {
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

#if defined(FASTCLS_AVX512)

// The same for sixteen.
inline void transpose16(__m512 (&r)[16]) {
  __m512 pair[16], quad[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  // quad[4 g + i] has column 4 q + i of rows 4 g … 4 g + 3 in its quarter q.
  for (int i = 0; i < 4; ++i) {
    const __m512 even_low = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0xdd);
    r[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    r[4 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    r[12 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

#endif

// ---- four floats of each of eight rows, at p, p + row, …

// One register of four floats of row i and of row i + 4.
inline __m256 load4x2(const float* p, int64_t distance) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + distance),
                              1);
}
template <typename T>
inline __m128i join4x2(const T* p, int64_t distance) {
  return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + distance)));
}
inline __m256 load4x2(const BFloat16* p, int64_t distance) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(join4x2(p, distance)), 16));
}
inline __m256 load4x2(const Half* p, int64_t distance) {
  return _mm256_cvtph_ps(join4x2(p, distance));
}
inline void store4x2(float* p, int64_t distance, __m256 v) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(v));
  _mm_storeu_ps(p + distance, _mm256_extractf128_ps(v, 1));
}
template <typename T>
inline void store4x2(T* p, int64_t distance, __m256 v) {
  const __m128i halves = to_half(v, p);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), halves);
  // Not _mm_storeh_pd: it writes a double, which must not lie at any address but its multiples
  // of 8.
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + distance), _mm_unpackhi_epi64(halves, halves));
}

// Transposes the 4 x 4 floats in the lower halves of r, and those in the upper halves. Its own
// inverse. Eight shuffles, where an 8 x 8 transpose takes twenty-four for twice the floats.
inline void transpose4x2(__m256 (&r)[4]) {
  const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
  r[0] = _mm256_shuffle_ps(a, c, 0x44), r[1] = _mm256_shuffle_ps(a, c, 0xee);
  r[2] = _mm256_shuffle_ps(b, d, 0x44), r[3] = _mm256_shuffle_ps(b, d, 0xee);
}

// ---- four floats of each of kLanes rows

#if defined(FASTCLS_AVX512)

inline __m256i to_half(__m512 v, const Half*) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#if !defined(FASTCLS_AVX512_BF16)
inline __m256i to_half(__m512 v, const BFloat16*) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i result = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                               _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}
#endif

inline void store16(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
template <typename T>
inline void store16(T* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(v, p));
}

// Floats of rows at p, p + step, p + 2 step and p + 3 step, in the register's quarters.
inline Vec load_quads(const float* p, int64_t step) {
  __m512 v = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
  v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(p + step));
  v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(p + 2 * step));
  return {_mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(p + 3 * step))};
}
inline __m512 widen(__m256i halves, const Half*) { return _mm512_cvtph_ps(halves); }
inline __m512 widen(__m256i halves, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
template <typename T>
inline Vec load_quads(const T* p, int64_t step) {
  const __m256i low = _mm256_castsi128_si256(join4x2(p, step));
  return {widen(_mm256_inserti128_si256(low, join4x2(p + 2 * step, step), 1), p)};
}
inline void store_quads(float* p, int64_t step, Vec x) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(x.v));
  _mm_storeu_ps(p + step, _mm512_extractf32x4_ps(x.v, 1));
  _mm_storeu_ps(p + 2 * step, _mm512_extractf32x4_ps(x.v, 2));
  _mm_storeu_ps(p + 3 * step, _mm512_extractf32x4_ps(x.v, 3));
}
template <typename T>
inline void store_quads(T* p, int64_t step, Vec x) {
  const __m256i halves = to_half(x.v, p);
  const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + step), _mm_unpackhi_epi64(low, low));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * step), high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 3 * step), _mm_unpackhi_epi64(high, high));
}
// The first n < 4 floats of each row, where a row has no more; nothing else is touched.
inline Vec load_quads_part(const float* p, int64_t step, int n) {
  const auto mask = static_cast<__mmask8>((1 << n) - 1);
  __m512 v = _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, p));
  v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, p + step), 1);
  v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, p + 2 * step), 2);
  return {_mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, p + 3 * step), 3)};
}
template <typename T>
inline Vec load_quads_part(const T* p, int64_t step, int n) {
  const auto mask = static_cast<__mmask8>((1 << n) - 1);
  const auto row = [&](int i) { return _mm_maskz_loadu_epi16(mask, p + i * step); };
  const __m256i low = _mm256_castsi128_si256(_mm_unpacklo_epi64(row(0), row(1)));
  return {widen(_mm256_inserti128_si256(low, _mm_unpacklo_epi64(row(2), row(3)), 1), p)};
}
inline void store_quads_part(float* p, int64_t step, int n, Vec x) {
  const auto mask = static_cast<__mmask8>((1 << n) - 1);
  _mm_mask_storeu_ps(p, mask, _mm512_castps512_ps128(x.v));
  _mm_mask_storeu_ps(p + step, mask, _mm512_extractf32x4_ps(x.v, 1));
  _mm_mask_storeu_ps(p + 2 * step, mask, _mm512_extractf32x4_ps(x.v, 2));
  _mm_mask_storeu_ps(p + 3 * step, mask, _mm512_extractf32x4_ps(x.v, 3));
}
template <typename T>
inline void store_quads_part(T* p, int64_t step, int n, Vec x) {
  const auto mask = static_cast<__mmask8>((1 << n) - 1);
  const __m256i halves = to_half(x.v, p);
  const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
  _mm_mask_storeu_epi16(p, mask, low);
  _mm_mask_storeu_epi16(p + step, mask, _mm_unpackhi_epi64(low, low));
  _mm_mask_storeu_epi16(p + 2 * step, mask, high);
  _mm_mask_storeu_epi16(p + 3 * step, mask, _mm_unpackhi_epi64(high, high));
}
// Two quads of each row: those at p, p + step, … and those behind them.
inline void load_quad_pair(const float* p, int64_t step, Vec* first, Vec* second) {
  const auto two = [&](int i) {
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(p + i * step));
    return _mm512_insertf32x8(low, _mm256_loadu_ps(p + (i + 1) * step), 1);
  };
  const __m512 low = two(0), high = two(2);
  first->v = _mm512_shuffle_f32x4(low, high, 0x88);
  second->v = _mm512_shuffle_f32x4(low, high, 0xdd);
}
inline void store_quad_pair(float* p, int64_t step, Vec first, Vec second) {
  const __m512d a = _mm512_castps_pd(first.v), b = _mm512_castps_pd(second.v);
  const auto two = [&](int i, __m512i which) {
    const __m512 v = _mm512_castpd_ps(_mm512_permutex2var_pd(a, which, b));
    _mm256_storeu_ps(p + i * step, _mm512_castps512_ps256(v));
    _mm256_storeu_ps(p + (i + 1) * step, _mm512_extractf32x8_ps(v, 1));
  };
  two(0, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11));
  two(2, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
}
// Eight halves of each of four rows, in the register's quarters.
template <typename T>
inline __m512i load_octs(const T* p, int64_t step) {
  const auto row = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step));
  };
  __m512i v = _mm512_castsi128_si512(row(0));
  v = _mm512_inserti32x4(v, row(1), 1);
  v = _mm512_inserti32x4(v, row(2), 2);
  return _mm512_inserti32x4(v, row(3), 3);
}
template <typename T>
inline void store_octs(T* p, int64_t step, __m512i v) {
  const auto row = [&](int i) { return reinterpret_cast<__m128i*>(p + i * step); };
  _mm_storeu_si128(row(0), _mm512_castsi512_si128(v));
  _mm_storeu_si128(row(1), _mm512_extracti32x4_epi32(v, 1));
  _mm_storeu_si128(row(2), _mm512_extracti32x4_epi32(v, 2));
  _mm_storeu_si128(row(3), _mm512_extracti32x4_epi32(v, 3));
}
inline void load_quad_pair(const BFloat16* p, int64_t step, Vec* first, Vec* second) {
  const __m512i v = load_octs(p, step), zero = _mm512_setzero_si512();
  first->v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, v));
  second->v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, v));
}
inline void load_quad_pair(const Half* p, int64_t step, Vec* first, Vec* second) {
  const __m512i v =
      _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), load_octs(p, step));
  first->v = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
  second->v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
}
template <typename T>
inline void store_quad_pair(T* p, int64_t step, Vec first, Vec second) {
  const __m512i v =
      _mm512_inserti64x4(_mm512_castsi256_si512(to_half(first.v, p)), to_half(second.v, p), 1);
  store_octs(p, step, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), v));
}
// The quad at p in every quarter.
inline Vec repeat_quad(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
// Lane i of each quarter in all four of its lanes.
template <int i>
inline Vec spread_lane(Vec x) {
  return {_mm512_permute_ps(x.v, 0x55 * i)};
}
// Of each quarter the even lanes of a, then those of b; the odd ones.
inline Vec even_lanes(Vec a, Vec b) { return {_mm512_shuffle_ps(a.v, b.v, 0x88)}; }
inline Vec odd_lanes(Vec a, Vec b) { return {_mm512_shuffle_ps(a.v, b.v, 0xdd)}; }
// The first n lanes of each quarter.
inline Vec::Mask quad_start(int n) { return static_cast<Vec::Mask>(0x1111 * ((1 << n) - 1)); }
// op over the lanes of each quarter: of r[i] in its lane i.
template <typename Op>
inline Vec join_quads(const Vec (&r)[4], const Op& op) {
  const Vec a =
      op(Vec{_mm512_unpacklo_ps(r[0].v, r[1].v)}, Vec{_mm512_unpackhi_ps(r[0].v, r[1].v)});
  const Vec b =
      op(Vec{_mm512_unpacklo_ps(r[2].v, r[3].v)}, Vec{_mm512_unpackhi_ps(r[2].v, r[3].v)});
  return op(Vec{_mm512_shuffle_ps(a.v, b.v, 0x44)}, Vec{_mm512_shuffle_ps(a.v, b.v, 0xee)});
}
// The sum of row i's lanes in lane i.
inline Vec sum_lanes(const Vec (&rows)[16]) {
  const auto add = [](Vec a, Vec b) { return Vec{a.v + b.v}; };
  const auto four = [&](int i) {
    return join_quads({rows[i], rows[i + 1], rows[i + 2], rows[i + 3]}, add);
  };
  const auto quarters = [&](Vec a, Vec b) {
    return Vec{_mm512_shuffle_f32x4(a.v, b.v, 0x88) + _mm512_shuffle_f32x4(a.v, b.v, 0xdd)};
  };
  return quarters(quarters(four(0), four(4)), quarters(four(8), four(12)));
}
// Lanes x[lane[0]], x[lane[1]], …
inline Vec pick_lanes(Vec x, const int32_t* lane) {
  return {_mm512_permutexvar_ps(_mm512_loadu_si512(lane), x.v)};
}
// Transposes the 4 x 4 floats in each quarter.
inline void transpose_quads(Vec (&r)[4]) {
  const __m512 a = _mm512_unpacklo_ps(r[0].v, r[1].v), b = _mm512_unpackhi_ps(r[0].v, r[1].v);
  const __m512 c = _mm512_unpacklo_ps(r[2].v, r[3].v), d = _mm512_unpackhi_ps(r[2].v, r[3].v);
  r[0] = {_mm512_shuffle_ps(a, c, 0x44)}, r[1] = {_mm512_shuffle_ps(a, c, 0xee)};
  r[2] = {_mm512_shuffle_ps(b, d, 0x44)}, r[3] = {_mm512_shuffle_ps(b, d, 0xee)};
}

#else

template <typename T>
inline Vec load_quads(const T* p, int64_t step) {
  return {load4x2(p, step)};
}
template <typename T>
inline void store_quads(T* p, int64_t step, Vec x) {
  store4x2(p, step, x.v);
}
inline void load_quad_pair(const float* p, int64_t step, Vec* first, Vec* second) {
  const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + step);
  first->v = _mm256_permute2f128_ps(a, b, 0x20), second->v = _mm256_permute2f128_ps(a, b, 0x31);
}
inline void store_quad_pair(float* p, int64_t step, Vec first, Vec second) {
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(first.v, second.v, 0x20));
  _mm256_storeu_ps(p + step, _mm256_permute2f128_ps(first.v, second.v, 0x31));
}
template <typename T>
inline void load_quad_pair(const T* p, int64_t step, Vec* first, Vec* second) {
  *first = load_quads(p, step), *second = load_quads(p + 4, step);
}
template <typename T>
inline void store_quad_pair(T* p, int64_t step, Vec first, Vec second) {
  store_quads(p, step, first), store_quads(p + 4, step, second);
}
inline Vec repeat_quad(const float* p) {
  return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
}
template <int i>
inline Vec spread_lane(Vec x) {
  return {_mm256_permute_ps(x.v, 0x55 * i)};
}
inline Vec even_lanes(Vec a, Vec b) { return {_mm256_shuffle_ps(a.v, b.v, 0x88)}; }
inline Vec odd_lanes(Vec a, Vec b) { return {_mm256_shuffle_ps(a.v, b.v, 0xdd)}; }
inline Vec::Mask quad_start(int n) {
  const float lane[4] = {0, 1, 2, 3};
  return Vec::greater(Vec::set(static_cast<float>(n)), repeat_quad(lane));
}
template <typename Op>
inline Vec join_quads(const Vec (&r)[4], const Op& op) {
  const Vec a =
      op(Vec{_mm256_unpacklo_ps(r[0].v, r[1].v)}, Vec{_mm256_unpackhi_ps(r[0].v, r[1].v)});
  const Vec b =
      op(Vec{_mm256_unpacklo_ps(r[2].v, r[3].v)}, Vec{_mm256_unpackhi_ps(r[2].v, r[3].v)});
  return op(Vec{_mm256_shuffle_ps(a.v, b.v, 0x44)}, Vec{_mm256_shuffle_ps(a.v, b.v, 0xee)});
}
// The sum of row i's lanes in lane i.
inline Vec sum_lanes(const Vec (&rows)[8]) {
  const auto add = [](Vec a, Vec b) { return Vec{a.v + b.v}; };
  const Vec a = join_quads({rows[0], rows[1], rows[2], rows[3]}, add);
  const Vec b = join_quads({rows[4], rows[5], rows[6], rows[7]}, add);
  return {_mm256_permute2f128_ps(a.v, b.v, 0x20) + _mm256_permute2f128_ps(a.v, b.v, 0x31)};
}
// Lanes x[lane[0]], x[lane[1]], …
inline Vec pick_lanes(Vec x, const int32_t* lane) {
  return {
      _mm256_permutevar8x32_ps(x.v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane)))};
}
inline void transpose_quads(Vec (&r)[4]) {
  __m256 v[4] = {r[0].v, r[1].v, r[2].v, r[3].v};
  transpose4x2(v);
  for (int i = 0; i < 4; ++i) r[i] = {v[i]};
}

#endif
