/* Processors with AVX2, FMA and F16C: eight lanes, and bytes multiplied in pairs. */
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define LEVEL_NAME avx2
#define LANES 8
#include "vectors.h"
#include "registers.h"

#define AT_ONCE 4
#define SIDE 1
#define READY_FROM 8
#define CHAINS 4

INLINE __m256i four(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

#define DOT_PAIRS 1

INLINE vi pairs_of(vi weight, const int8_t *x) { return (vi)_mm256_maddubs_epi16((__m256i)weight, four(x)); }

/* In the order in which they are written: gcc would gather products, or add them up in a tree, and has no registers for that. */
INLINE vi dot_pairs(vi pairs, vi weight, const int8_t *x) {
    __m256i products;
    __asm__ volatile("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(pairs), "=&x"(products) : "x"(four(x)), "x"(weight));
    return pairs;
}

INLINE vi add_pairs(vi sum, vi pairs) { return sum + (vi)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }

/* All eight bits, minus their zero: signs go to the other factor, so that 128 * 127 * 2 is the most. */
#define DOT_SIGNED 1

INLINE vi dot4_wide(vi sum, vi weight, const int8_t *x) {
    const __m256i number = _mm256_xor_si256((__m256i)weight, _mm256_set1_epi8(-128));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(number), _mm256_sign_epi8(four(x), number));
    sum = add_pairs(sum, (vi)pairs);
    __asm__("" : "+x"(sum));
    return sum;
}

INLINE vi lookup_bytes(const uint8_t table[16], vi index) {
    return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), (__m256i)index);
}

INLINE vf lookup_floats(const float table[16], vi index) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}

INLINE vf widen_halves(const uint8_t *at) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }

#include "tile.h"

const level_table avx2_table = {avx2_product, avx2_prepare, avx2_activate, avx2_peak, CHAINS, avx2_dots, avx2_unpack};
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int not_this_processor;
#endif
