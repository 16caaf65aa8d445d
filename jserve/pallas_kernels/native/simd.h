// Vectors of the widest registers that the compiler was told of, in GCC's and Clang's own notation.
#ifndef JSERVE_NATIVE_SIMD_H_
#define JSERVE_NATIVE_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace jserve {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;  // SSE, NEON
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

// A bfloat16: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }
inline float ToFloat(BFloat16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void Put(float x, float* to) { *to = x; }
inline void Put(float x, BFloat16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    to->bits = static_cast<uint16_t>((bits >> 16) | 0x40);
    return;
  }
  to->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline Vec Splat(float x) { return Vec{} + x; }

// A float from memory in all lanes, by the load itself; Splat takes one more shuffle.
inline Vec Broadcast(const float* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(*from);
#elif defined(__AVX__)
  return (Vec)_mm256_broadcast_ss(from);
#else
  return Splat(*from);
#endif
}

inline Vec Load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec Load(const BFloat16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  IntVec wide = __builtin_convertvector(half, IntVec) << 16;
  Vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

inline void Store(Vec v, float* to) { std::memcpy(to, &v, sizeof v); }

inline void Store(Vec v, BFloat16* to) {  // to the nearest, ties to even
  IntVec bits;
  std::memcpy(&bits, &v, sizeof bits);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec quiet = (bits >> 16) | 0x40;  // of a NaN, which rounding could make infinite
  const HalfVec half = __builtin_convertvector(v == v ? rounded : quiet, HalfVec);
  std::memcpy(to, &half, sizeof half);
}

// The first `count` lanes from memory, the others zero.
template <class T>
inline Vec LoadSome(const T* from, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return Load(padded);
}

inline void StoreSome(Vec v, float* to, int64_t count) { std::memcpy(to, &v, count * sizeof(float)); }

// Prefetches `count` elements that will be read soon.
template <class T>
inline void Prefetch(const T* from, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(bytes + i, 0, 2);  // into the second cache
  }
}

inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

inline Vec AsFloat(IntVec bits) {
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline IntVec AsInt(Vec v) {
  IntVec bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline Vec Abs(Vec v) { return AsFloat(AsInt(v) & 0x7fffffff); }

// All lanes folded into one by `op`, always in the same order: halves until one lane is left.
template <class Op>
inline float Fold(Vec v, const Op& op) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  // These are masked forms, because GCC 12 warns of the undefined operand of the others.
  const __m512d wide = _mm512_castps_pd((__m512)v);
  const __m256d low = _mm512_maskz_extractf64x4_pd(0xff, wide, 0);
  const __m256d high = _mm512_maskz_extractf64x4_pd(0xff, wide, 1);
  const __m256 eight = op(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
#else
  const __m256 eight = (__m256)v;
#endif
  __m128 four = op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = op(four, _mm_movehl_ps(four, four));
  return op(four[0], four[1]);
#else
  return op(op(v[0], v[2]), op(v[1], v[3]));
#endif
}

inline float Sum(Vec v) {
  return Fold(v, [](auto a, auto b) { return a + b; });
}

// Lane i of the result is the sum of all lanes of sums[i], in one order for every i.
inline Vec LaneSums(const Vec (&sums)[kLanes]) {
#if defined(__AVX512F__)
  // These are masked forms for GCC 12, as in Fold.
  constexpr __mmask16 kAll = 0xffff;
  __m512 quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto a = (__m512)sums[4 * i], b = (__m512)sums[4 * i + 1];
    const auto c = (__m512)sums[4 * i + 2], d = (__m512)sums[4 * i + 3];
    const __m512d ab = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(kAll, a, b) +
                                        _mm512_maskz_unpackhi_ps(kAll, a, b));
    const __m512d cd = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(kAll, c, d) +
                                        _mm512_maskz_unpackhi_ps(kAll, c, d));
    quads[i] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, ab, cd)) +
               _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, ab, cd));
  }
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_maskz_shuffle_f32x4(kAll, a, b, 0x88) +
           _mm512_maskz_shuffle_f32x4(kAll, a, b, 0xdd);
  };
  return (Vec)halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]));
#elif defined(__AVX__)
  __m256 quads[2];
  for (int i = 0; i < 2; ++i) {
    const auto a = (__m256)sums[4 * i], b = (__m256)sums[4 * i + 1];
    const auto c = (__m256)sums[4 * i + 2], d = (__m256)sums[4 * i + 3];
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
    const __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d));
    quads[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) +
               _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
  }
  return (Vec)(_mm256_permute2f128_ps(quads[0], quads[1], 0x20) +
               _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
#else
  Vec all;
  for (int i = 0; i < kLanes; ++i) all[i] = Sum(sums[i]);
  return all;
#endif
}

inline float Largest(Vec v) {
  return Fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e to the x within about one unit in the last place, for x <= 88. Cephes' polynomial after a
// reduction to |r| <= ln(2) / 2; what would be denormal is the smallest normal number or zero.
inline Vec Exp(Vec x) {
  x = x < Splat(-87.0f) ? Splat(-87.0f) : x;  // NaN stays
  const Vec shifter = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = x * 1.44269504f + shifter;
  IntVec exponent;
  std::memcpy(&exponent, &n, sizeof n);
  n -= shifter;
  Vec r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  Vec p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * AsFloat((exponent << 23) + 0x3f800000);
}

}  // namespace jserve

#endif  // JSERVE_NATIVE_SIMD_H_
