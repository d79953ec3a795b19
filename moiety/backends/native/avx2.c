/* Processors with AVX2, FMA and F16C: two registers for a vector. */
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define LEVEL_NAME avx2
#include "vectors.h"

#define AT_ONCE 2
#define CHAINS 4

typedef struct {
    __m256i low, high;
} halves;

INLINE halves cut(vi whole) {
    halves h;
    memcpy(&h, &whole, sizeof h);
    return h;
}

INLINE vi whole(__m256i low, __m256i high) {
    const halves h = {low, high};
    vi both;
    memcpy(&both, &h, sizeof both);
    return both;
}

INLINE __m256i four(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

/* For weights up to 31, whose pairs of products fit 16 bits. */
INLINE __m256i dot4_half(__m256i sum, __m256i weight, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(weight, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE vi dot4(vi sum, vi weight, const int8_t *x) {
    const halves s = cut(sum), w = cut(weight);
    const __m256i x4 = four(x);
    return whole(dot4_half(s.low, w.low, x4), dot4_half(s.high, w.high, x4));
}

/* All eight bits: low and high four apart. */
INLINE __m256i dot4_wide_half(__m256i sum, __m256i weight, __m256i x) {
    const __m256i mask = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(weight, mask), x);
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(weight, 4), mask), x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, one));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(high, sixteen));
}

INLINE vi dot4_wide(vi sum, vi weight, const int8_t *x) {
    const halves s = cut(sum), w = cut(weight);
    const __m256i x4 = four(x);
    return whole(dot4_wide_half(s.low, w.low, x4), dot4_wide_half(s.high, w.high, x4));
}

INLINE vi lookup_bytes(const uint8_t table[16], vi index) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    const halves i = cut(index);
    return whole(_mm256_shuffle_epi8(both, i.low), _mm256_shuffle_epi8(both, i.high));
}

INLINE vf lookup_floats(const float table[16], vi index) {
    const halves i = cut(index);
    const __m256 low = _mm256_i32gather_ps(table, i.low, 4), high = _mm256_i32gather_ps(table, i.high, 4);
    return (vf)whole(_mm256_castps_si256(low), _mm256_castps_si256(high));
}

INLINE vf widen_halves(const uint8_t *at) {
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at + 16)));
    return (vf)whole(_mm256_castps_si256(low), _mm256_castps_si256(high));
}

#include "tile.h"

const level_table avx2_table = {avx2_product, avx2_prepare, avx2_activate, avx2_peak, CHAINS, avx2_dots, avx2_unpack};
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int not_this_processor;
#endif
