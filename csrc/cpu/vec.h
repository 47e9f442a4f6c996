// Vec: one vector register of floats. The kernels are written once over it.
//
// No include guard and no namespace: an ISA's source file includes this inside its own namespace
// and its own `#pragma GCC target` region, after the standard and intrinsics headers (a template
// defined outside the region would compile to one call per vector operation).
// Needs FASTCLS_AVX2 or FASTCLS_AVX512 to be defined.

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

#if defined(FASTCLS_AVX512)

struct Vec {
  static constexpr int kLanes = 16;
  using Mask = __mmask16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // Unsigned bytes as floats.
  static Vec load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Floats that are whole numbers in [0, 255], as bytes.
  void store(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  // Floats that are whole numbers, as int32.
  void store(int32_t* p) const { _mm512_storeu_si512(p, _mm512_cvtps_epi32(v)); }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
  static Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
  static Mask unordered(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
  static Mask either(Mask a, Mask b) { return a | b; }
  static Mask both(Mask a, Mask b) { return a & b; }
  static unsigned bits(Mask m) { return m; }
  // The first n lanes.
  static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  // a where m is set, else b.
  static Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }

  // A byte for each lane.
  struct Bytes {
    __m128i v;
    void store(uint8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  };
  static Bytes bytes(int x) { return {_mm_set1_epi8(static_cast<char>(x))}; }
  static Bytes select(Mask m, Bytes a, Bytes b) { return {_mm_mask_blend_epi8(m, b.v, a.v)}; }

  static Mask not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }
  // a * b + c where m is set, else 0: here the mask costs nothing.
  static Vec fma_or_zero(Mask m, Vec a, Vec b, Vec c) {
    return {_mm512_maskz_fmadd_ps(m, a.v, b.v, c.v)};
  }
};

#else

struct Vec {
  static constexpr int kLanes = 8;
  using Mask = __m256;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  // Unsigned bytes as floats.
  static Vec load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Floats that are whole numbers in [0, 255], as bytes.
  void store(uint8_t* p) const {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  // Floats that are whole numbers, as int32.
  void store(int32_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(v));
  }

  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  static Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
  static Mask is_nan(Vec a) { return _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q); }
  static Mask unordered(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q); }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static unsigned bits(Mask m) { return _mm256_movemask_ps(m); }
  // The first n lanes.
  static Mask first(int n) {
    return greater(set(static_cast<float>(n)), {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)});
  }
  // a where m is set, else b.
  static Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }

  // A byte for each lane: a float until it is stored, as wide as the masks are.
  struct Bytes {
    __m256 v;
    void store(uint8_t* p) const { Vec{v}.store(p); }
  };
  static Bytes bytes(int x) { return {_mm256_set1_ps(static_cast<float>(x))}; }
  static Bytes select(Mask m, Bytes a, Bytes b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }

  static Mask not_less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ); }
  // a * b + c where m is set, else 0.
  static Vec fma_or_zero(Mask m, Vec a, Vec b, Vec c) {
    return {_mm256_and_ps(m, _mm256_fmadd_ps(a.v, b.v, c.v))};
  }
};

#endif

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
