/* What AVX-512 with VNNI gives to tile.h; the AMX level shares it for few rows. */
#define LANES 16
#include "registers.h"

#define AT_ONCE 5
#define SIDE 2
#define READY_FROM 0
#define DOT_PAIRS 0
#define DOT_SIGNED 0
#define CHAINS 12

INLINE vi dot4(vi sum, vi weight, const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, _mm512_set1_epi32(bytes));
}

INLINE vi dot4_wide(vi sum, vi weight, const int8_t *x) { return dot4(sum, weight, x); }

INLINE vi lookup_bytes(const uint8_t table[16], vi index) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (vi)_mm512_shuffle_epi8(all, (__m512i)index);
}

INLINE vf lookup_floats(const float table[16], vi index) {
    return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}

INLINE vf widen_halves(const uint8_t *at) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }

#include "tile.h"
