/* The level that every processor has: plain C, left to the compiler. */
#define LEVEL_NAME portable
#define LANES 4
#include "vectors.h"
#include "registers.h"

#define AT_ONCE 2
#define CHAINS 2

INLINE vi dot4(vi sum, vi weight, const int8_t *x) {
    uint8_t byte[4 * LANES];
    memcpy(byte, &weight, sizeof byte);
    for (int n = 0; n < LANES; n++)
        for (int i = 0; i < 4; i++) sum[n] += byte[4 * n + i] * x[i];
    return sum;
}

INLINE vi dot4_wide(vi sum, vi weight, const int8_t *x) { return dot4(sum, weight, x); }

INLINE vi lookup_bytes(const uint8_t table[16], vi index) {
    uint8_t byte[4 * LANES];
    memcpy(byte, &index, sizeof byte);
    for (int n = 0; n < 4 * LANES; n++) byte[n] = table[byte[n]];
    memcpy(&index, byte, sizeof byte);
    return index;
}

INLINE vf lookup_floats(const float table[16], vi index) {
    vf found;
    for (int n = 0; n < LANES; n++) found[n] = table[index[n]];
    return found;
}

/* Numbers from float16: exponent and fraction move into place, and 2 ** 112 repairs the bias, subnormal numbers included. */
INLINE vf widen_halves(const uint8_t *at) {
    vi bits;
    for (int n = 0; n < LANES; n++) {
        uint16_t half;
        memcpy(&half, at + 2 * n, sizeof half);
        bits[n] = half;
    }
    const vi size = bits & 0x7fff;
    const vi special = size >= 0x7c00; /* infinite or not a number: the largest exponent stays the largest */
    const vi finite = (vi)((vf)(size << 13) * 0x1p112f);
    return (vf)((special & (size << 13 | 0x7f800000)) | (~special & finite) | (bits & 0x8000) << 16);
}

#include "tile.h"

const level_table portable_table = {portable_product, portable_prepare, portable_activate, portable_peak, CHAINS,
                                    portable_dots,    portable_unpack};
