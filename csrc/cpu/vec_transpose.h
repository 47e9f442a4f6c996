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
