/* The level that every processor has: plain C, left to the compiler. */
#define LEVEL_NAME portable
#define LANES 4
#include "vectors.h"
#include "registers.h"

#define AT_ONCE 4
#define SIDE 1
#define READY_FROM 0
#define CHAINS 2

typedef uint16_t vp __attribute__((vector_size(4 * LANES)));

/* A number for every half of a lane. */
INLINE vi halves_of(int8_t low, int8_t high) { return (vi){} + (int32_t)((uint16_t)low | (uint32_t)(uint16_t)high << 16); }

/* Weights 0 and 2 of each lane times their numbers, in 16 bits, and 1 and 3. */
INLINE vp even_products(vi weight, const int8_t *x) { return (vp)(weight & 0x00ff00ff) * (vp)halves_of(x[0], x[2]); }
INLINE vp odd_products(vi weight, const int8_t *x) { return (vp)((vi)((vu)weight >> 8) & 0x00ff00ff) * (vp)halves_of(x[1], x[3]); }

#define DOT_PAIRS 1
#define DOT_SIGNED 0

INLINE vi pairs_of(vi weight, const int8_t *x) { return (vi)(even_products(weight, x) + odd_products(weight, x)); }

INLINE vi dot_pairs(vi pairs, vi weight, const int8_t *x) { return (vi)((vp)pairs + (vp)pairs_of(weight, x)); }

INLINE vi add_pairs(vi sum, vi pairs) { return sum + (pairs << 16 >> 16) + (pairs >> 16); }

INLINE vi dot4_wide(vi sum, vi weight, const int8_t *x) {
    return add_pairs(add_pairs(sum, (vi)even_products(weight, x)), (vi)odd_products(weight, x));
}

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
