/* The products of one level. Included by a file that has set what its instruction set needs:
 *
 *   LEVEL(name)   the name with the level's suffix
 *   LANES         of a vector, one register's
 *   AT_ONCE       how many rows share an unpacked piece of a tile: as many as registers allow
 *   SIDE          how many row blocks they take side by side, 1 or 2
 *   READY_FROM    from how many rows on a piece of a tile is unpacked for all of them, once; 0: never. Needs a SIDE of 1
 *   CHAINS        how many vectors of 16 numbers are worked on side by side to see what the processor can do at most
 *   dot4, dot4_wide   to each lane of sums the products of its 4 unsigned bytes with 4 signed ones; wide: of all 8 bits
 *   DOT_PAIRS     if 1 there is no dot4, but pairs_of, sums of two products in 16 bits, dot_pairs, which adds them up, and
 *                 add_pairs, which adds those to sums in 32: of 8 quads of weights up to 15, of 4 of weights up to 31
 *   DOT_SIGNED    if 1, dot4_wide takes the code of zero off the weights
 *   lookup_bytes, lookup_floats, widen_halves
 *
 * A tile has 16 rows, a lane of 32 bits for each; a vector is one of the PARTS of them. Every output is summed in the same
 * order whatever the number of rows, so results do not depend on what else is in a batch. */

#include "exponential.h"

#define PARTS (ROWS / LANES)

INLINE vi LEVEL(line)(const uint8_t *at) {
    vi line;
    memcpy(&line, at, sizeof line);
    return line;
}

/* The scales of a part of a tile's rows. */
INLINE vf LEVEL(scales)(int kind, const uint8_t *at, int part) {
    if (kind != KIND_MXFP4) return widen_halves(at + 2 * LANES * part);
    vb bytes;
    memcpy(&bytes, at + LANES * part, sizeof bytes);
    const vi power = __builtin_convertvector(bytes, vi);
    /* 2 ** (power - 127), and half of it because the table holds doubled numbers; 0 means 2 ** -127 */
    vf half = (vf)(power << 23) * 0.5f;
    return LEVEL(choose)(power == 0, (vf){} + 0x1p-128f, half);
}

INLINE int LEVEL(zero_of)(int kind) {
    return kind == KIND_INT8 ? 128 : kind == KIND_INT4 ? 8 : kind == KIND_MXFP4 ? 12 : 0;
}

/* Columns 4 quad .. 4 quad + 3 of a part of an integer tile, as unsigned bytes. */
INLINE vi LEVEL(integers)(int kind, int group, const uint8_t *tile, int quad, int part) {
    tile += 4 * LANES * part;
    if (kind == KIND_INT8) return LEVEL(line)(tile + 64 * quad);
    const int lines = group / 8, high = quad >= lines;
    const vi both = LEVEL(line)(tile + 64 * (quad - high * lines));
    const vi code = (high ? (vi)((vu)both >> 4) : both) & 0x0f0f0f0f;
    if (kind != KIND_MXFP4) return code;
    static const uint8_t doubled[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* plus 12 */
    return lookup_bytes(doubled, code);
}

/* Column k of a part of a floating point tile. */
INLINE vf LEVEL(floats)(int kind, int group, const uint8_t *tile, int k, int part) {
    tile += 4 * LANES * part;
    if (kind == KIND_FLOAT32) return (vf)LEVEL(line)(tile + 64 * k);
    if (kind == KIND_BFLOAT16) {
        const vi pair = LEVEL(line)(tile + 64 * (k / 2));
        return (vf)(k % 2 ? pair & (int32_t)0xffff0000 : pair << 16);
    }
    if (kind == KIND_FLOAT8) {
        const vi code = (vi)((vu)LEVEL(line)(tile + 64 * (k / 4)) >> (8 * (k % 4)));
        return (vf)((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f; /* the exponent's bias is 7 there, 127 here */
    }
    static const float quantile[16] = MOIETY_NF4;
    const int high = k >= group / 2, place = k - high * group / 2;
    const vi code = (vi)((vu)LEVEL(line)(tile + 64 * (place / 4)) >> (8 * (place % 4) + 4 * high)) & 15;
    return lookup_floats(quantile, code);
}

/* Ask for the tiles that come PREFETCH_BYTES after group g's. Row blocks have `next` bytes, and `skip` more lie between the end of
 * one and what is multiplied after it. */
INLINE void LEVEL(fetch)(const uint8_t *tile, int64_t bytes, int64_t g, int blocks, int64_t next, int64_t skip) {
    const uint8_t *later = tile + PREFETCH_BYTES + ((g + 1) * bytes + PREFETCH_BYTES > next ? skip : 0);
    for (int b = 0; b < blocks; b++)
        for (int64_t ahead = 0; ahead < bytes; ahead += 64) __builtin_prefetch(later + b * next + ahead, 0, 3);
}

/* What a group of a row block takes when it is unpacked: bytes of integers, else floats. */
INLINE int64_t LEVEL(ready_bytes)(int kind, int group) { return ROWS * group * (is_integer(kind) ? 1 : 4); }

INLINE vi LEVEL(ready_line)(int kind, int group, const uint8_t *ready, int64_t g, int k, int part) {
    return LEVEL(line)(ready + g * LEVEL(ready_bytes)(kind, group) + 64 * k + 4 * LANES * part);
}

/* Some groups of `blocks` row blocks as the lines that rows are multiplied with, all of a block before the next's. */
INLINE void LEVEL(make_ready)(int kind, int group, int blocks, const matrix *w, span part, const uint8_t *tiles, uint8_t *to) {
    const int64_t next = w->groups * w->tile_bytes;
    const int lines = is_integer(kind) ? group / 4 : group;
    for (int b = 0; b < blocks; b++)
        for (int64_t g = part.from; g < part.to; g++) {
            const uint8_t *tile = tiles + b * next + g * w->tile_bytes;
            LEVEL(fetch)(tile, w->tile_bytes, g, 1, next, part.skip);
#pragma GCC unroll 32
            for (int k = 0; k < lines; k++)
                for (int v = 0; v < PARTS; v++, to += 4 * LANES) {
                    const vi line = is_integer(kind) ? LEVEL(integers)(kind, group, tile, k, v)
                                                     : (vi)LEVEL(floats)(kind, group, tile, k, v);
                    memcpy(to, &line, sizeof line);
                }
        }
}

/* `count` rows with `blocks` row blocks side by side: a line serves all rows, a broadcast number all blocks. Both are known when
 * this is compiled, and so are the kind and whether lines are ready. Vector v is part v % PARTS of row block v / PARTS. */
INLINE void LEVEL(integer_rows)(int kind, int group, int blocks, const matrix *w, span part, const uint8_t *tile,
                                const uint8_t *ready, const operand *x, const int64_t *row, int count,
                                float (*const *out)[ROWS], int64_t first) {
    vf total[AT_ONCE][2 * PARTS];
    const int8_t *code[AT_ONCE];
    const code_group *of[AT_ONCE];
    const int vectors = blocks * PARTS;
    const int64_t next = w->groups * w->tile_bytes; /* to the next row block */
    for (int i = 0; i < count; i++) {
        for (int v = 0; v < vectors; v++) {
            total[i][v] = (vf){};
            if (part.from) memcpy(&total[i][v], out[v / PARTS][first + i] + LANES * (v % PARTS), sizeof(vf));
        }
        code[i] = x->code + row[i] * x->width;
        of[i] = x->group + row[i] * x->groups;
    }
    const int code_bytes = kind == KIND_INT8 ? ROWS * group : ROWS * group / 2;
    const int scale_bytes = kind == KIND_MXFP4 ? ROWS : 2 * ROWS;
    const int tile_bytes = code_bytes + scale_bytes + (kind == KIND_INT4_MINIMUM ? 2 * ROWS : 0);
    tile += part.from * tile_bytes;
    for (int64_t g = part.from; g < part.to; g++, tile += tile_bytes) {
        if (!part.warm) LEVEL(fetch)(tile, tile_bytes, g, blocks, next, part.skip);
        const int has_zero = kind != KIND_INT4_MINIMUM && !(DOT_SIGNED && kind == KIND_INT8);
        const int in_pairs = DOT_PAIRS && kind != KIND_INT8;
        vi inner[AT_ONCE][2 * PARTS];
        for (int i = 0; i < count; i++)
            for (int v = 0; v < vectors; v++) inner[i][v] = (vi){} + (has_zero && !in_pairs ? of[i][g].sum : 0);
#if DOT_PAIRS
        if (in_pairs) {
            const int run = kind == KIND_MXFP4 ? 4 : 8;
            for (int from = 0; from < group / 4; from += run) {
                vi pairs[AT_ONCE][2 * PARTS];
#pragma GCC unroll 8
                for (int quad = from; quad < from + run; quad++) {
                    vi line[2 * PARTS];
                    for (int v = 0; v < vectors; v++)
                        line[v] = ready ? LEVEL(ready_line)(kind, group, ready, g - part.from, quad, v)
                                        : LEVEL(integers)(kind, group, tile + v / PARTS * next, quad, v % PARTS);
                    for (int n = 0; n < count * vectors; n++) {
                        const int i = ready ? n % count : n / vectors, v = ready ? n / count : n % vectors; /* registers suffice so */
                        const int8_t *at = code[i] + g * group + 4 * quad;
                        pairs[i][v] = quad == from ? pairs_of(line[v], at) : dot_pairs(pairs[i][v], line[v], at);
                    }
                }
                for (int i = 0; i < count; i++)
                    for (int v = 0; v < vectors; v++)
                        inner[i][v] = add_pairs(from ? inner[i][v] : (vi){} + (has_zero ? of[i][g].sum : 0), pairs[i][v]);
            }
        } else
#endif
        {
            vi odd[2 * PARTS]; /* a single row's sums in two chains: whole numbers add up in any order */
            for (int v = 0; v < vectors; v++) odd[v] = (vi){};
#pragma GCC unroll 8
            for (int quad = 0; quad < group / 4; quad++) {
                vi line[2 * PARTS];
                for (int v = 0; v < vectors; v++) line[v] = LEVEL(integers)(kind, group, tile + v / PARTS * next, quad, v % PARTS);
                for (int i = 0; i < count; i++)
                    for (int v = 0; v < vectors; v++) {
                        const int8_t *at = code[i] + g * group + 4 * quad;
                        vi *const sum_of = count == 1 && quad % 2 ? &odd[v] : &inner[i][v];
#if !DOT_PAIRS
                        if (kind != KIND_INT8) *sum_of = dot4(*sum_of, line[v], at);
                        else
#endif
                            *sum_of = dot4_wide(*sum_of, line[v], at);
                    }
            }
            for (int v = 0; v < vectors && count == 1; v++) inner[0][v] += odd[v];
        }
        for (int v = 0; v < vectors; v++) {
            const uint8_t *at = tile + v / PARTS * next + code_bytes;
            const vf scales = LEVEL(scales)(kind, at, v % PARTS);
            vf minimum = {};
            if (kind == KIND_INT4_MINIMUM) minimum = widen_halves(at + scale_bytes + 2 * LANES * (v % PARTS));
            for (int i = 0; i < count; i++) {
                const code_group one = of[i][g];
                total[i][v] += __builtin_convertvector(inner[i][v], vf) * (scales * one.scale);
                if (kind == KIND_INT4_MINIMUM) total[i][v] += minimum * (one.scale * (float)one.sum);
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vectors; v++)
            memcpy(out[v / PARTS][first + i] + LANES * (v % PARTS), &total[i][v], sizeof(vf));
}

INLINE void LEVEL(float_rows)(int kind, int group, int blocks, const matrix *w, span part, const uint8_t *tile,
                              const uint8_t *ready, const operand *x, const int64_t *row, int count,
                              float (*const *out)[ROWS], int64_t first) {
    vf total[AT_ONCE][2 * PARTS];
    const float *value[AT_ONCE];
    const int vectors = blocks * PARTS;
    const int64_t next = w->groups * w->tile_bytes;
    for (int i = 0; i < count; i++) {
        for (int v = 0; v < vectors; v++) {
            total[i][v] = (vf){};
            if (part.from) memcpy(&total[i][v], out[v / PARTS][first + i] + LANES * (v % PARTS), sizeof(vf));
        }
        value[i] = x->value + row[i] * x->width;
    }
    tile += part.from * w->tile_bytes;
    for (int64_t g = part.from; g < part.to; g++, tile += w->tile_bytes) {
        if (!part.warm) LEVEL(fetch)(tile, w->tile_bytes, g, blocks, next, part.skip);
        vf inner[AT_ONCE][2 * PARTS];
        for (int i = 0; i < count; i++)
            for (int v = 0; v < vectors; v++) inner[i][v] = (vf){};
#pragma GCC unroll 8
        for (int k = 0; k < group; k++) {
            vf line[2 * PARTS];
            for (int v = 0; v < vectors; v++)
                line[v] = ready ? (vf)LEVEL(ready_line)(kind, group, ready, g - part.from, k, v)
                                : LEVEL(floats)(kind, group, tile + v / PARTS * next, k, v % PARTS);
            for (int i = 0; i < count; i++)
                for (int v = 0; v < vectors; v++) inner[i][v] += line[v] * value[i][g * group + k];
        }
        for (int v = 0; v < vectors; v++) {
            vf scales = {};
            if (kind == KIND_FLOAT8 || kind == KIND_NF4)
                scales = widen_halves(tile + v / PARTS * next + w->tile_bytes - 2 * ROWS + 2 * LANES * (v % PARTS));
            for (int i = 0; i < count; i++)
                total[i][v] += kind == KIND_FLOAT8 || kind == KIND_NF4 ? inner[i][v] * scales : inner[i][v];
        }
    }
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vectors; v++)
            memcpy(out[v / PARTS][first + i] + LANES * (v % PARTS), &total[i][v], sizeof(vf));
}

/* `side` row blocks at once where there are so many, else one after the other. */
INLINE void LEVEL(rows)(int kind, int group, int blocks, int side, const matrix *w, span part, const uint8_t *tiles,
                        const uint8_t *ready, const operand *x, const int64_t *row, int count, float (*const *out)[ROWS],
                        int64_t first) {
    const int64_t next = w->groups * w->tile_bytes, beside = (part.to - part.from) * LEVEL(ready_bytes)(kind, group);
    const int both = side == 2 && blocks == 2;
    for (int b = 0; b < (both ? 1 : blocks); b++) {
        const uint8_t *at = tiles + b * next, *lines = ready ? ready + b * beside : NULL;
        if (is_integer(kind) && both) LEVEL(integer_rows)(kind, group, 2, w, part, at, lines, x, row, count, out, first);
        else if (is_integer(kind)) LEVEL(integer_rows)(kind, group, 1, w, part, at, lines, x, row, count, out + b, first);
        else if (both) LEVEL(float_rows)(kind, group, 2, w, part, at, lines, x, row, count, out, first);
        else LEVEL(float_rows)(kind, group, 1, w, part, at, lines, x, row, count, out + b, first);
    }
}

/* AT_ONCE rows at a time, then 4, then single ones. */
INLINE void LEVEL(sets)(int kind, int group, int blocks, const matrix *w, span part, const uint8_t *tiles, const uint8_t *ready,
                        const operand *x, const int64_t *row, int64_t count, float (*const *out)[ROWS]) {
    int64_t i = 0;
    for (; i + AT_ONCE <= count; i += AT_ONCE, part.warm = 1)
        LEVEL(rows)(kind, group, blocks, SIDE, w, part, tiles, ready, x, row + i, AT_ONCE, out, i);
    for (; AT_ONCE > 4 && i + 4 <= count; i += 4, part.warm = 1)
        LEVEL(rows)(kind, group, blocks, SIDE, w, part, tiles, ready, x, row + i, 4, out, i);
    for (; i < count; i++, part.warm = 1)
        LEVEL(rows)(kind, group, blocks, ready ? 1 : 2, w, part, tiles, ready, x, row + i, 1, out, i);
}

/* Where several sets of rows need the same tiles, they all take a piece of the columns that fits the first cache before the next
 * piece; sums continue where they were left, so nothing is added in another order. */
INLINE void LEVEL(pieces)(int kind, int group, int blocks, const matrix *w, const uint8_t *tiles, const operand *x,
                          const int64_t *row, int64_t count, float (*const *out)[ROWS]) {
    const int is_slow = kind == KIND_FLOAT8 || kind >= KIND_MXFP4 || (kind >= KIND_INT4 && group > 32); /* to unpack */
    const int is_ready = READY_FROM && is_slow && count >= READY_FROM;
    const int64_t unpacked = blocks * LEVEL(ready_bytes)(kind, group), packed = blocks * w->tile_bytes;
    const int64_t piece = is_ready ? READY_BYTES / unpacked : count > AT_ONCE ? 1 + PIECE_BYTES / packed : w->groups;
    for (int64_t from = 0; from < w->groups; from += piece) {
        const span part = {from, from + piece < w->groups ? from + piece : w->groups, (blocks - 1) * w->groups * w->tile_bytes,
                           is_ready};
        if (is_ready) {
            uint8_t ready[READY_BYTES] __attribute__((aligned(64)));
            LEVEL(make_ready)(kind, group, blocks, w, part, tiles, ready);
            LEVEL(sets)(kind, group, blocks, w, part, tiles, ready, x, row, count, out);
        } else LEVEL(sets)(kind, group, blocks, w, part, tiles, NULL, x, row, count, out);
    }
}

#define BY_KIND(kind, group) LEVEL(pieces)(kind, group, blocks, w, tiles, x, row, count, out)
#define BY_GROUP(kind)                                                                                                 \
    do {                                                                                                               \
        if (w->group == 32) BY_KIND(kind, 32);                                                                         \
        else if (w->group == 64) BY_KIND(kind, 64);                                                                    \
        else BY_KIND(kind, 128);                                                                                       \
    } while (0)

static void LEVEL(product)(const matrix *w, const uint8_t *tiles, int32_t blocks, const operand *x, const int64_t *row,
                           int64_t count, float (*const *out)[ROWS]) {
    switch (w->kind) {
    case KIND_FLOAT32: BY_KIND(KIND_FLOAT32, 16); break;
    case KIND_BFLOAT16: BY_KIND(KIND_BFLOAT16, 32); break;
    case KIND_FLOAT8: BY_KIND(KIND_FLOAT8, 128); break;
    case KIND_NF4: BY_GROUP(KIND_NF4); break;
    case KIND_INT8: BY_GROUP(KIND_INT8); break;
    case KIND_INT4: BY_GROUP(KIND_INT4); break;
    case KIND_INT4_MINIMUM: BY_GROUP(KIND_INT4_MINIMUM); break;
    default: BY_KIND(KIND_MXFP4, 32); break;
    }
}

/* To the nearest whole number, halves to the even one, for |x| < 2 ** 22. */
INLINE int32_t LEVEL(nearest)(float x) {
    union { float number; int32_t bits; } shifted = {.number = x + 0x1.8p23f};
    return (int32_t)((uint32_t)shifted.bits - 0x4b400000u); /* of what is not finite: anything */
}

static void LEVEL(prepare)(const matrix *w, const float *x, int8_t *code, float *value, code_group *group) {
    const int64_t columns = w->columns, width = w->groups * w->group;
    if (!is_integer(w->kind)) {
        memcpy(value, x, columns * sizeof(float));
        memset(value + columns, 0, (width - columns) * sizeof(float));
        return;
    }
    for (int64_t g = 0; g < w->groups; g++) {
        const int64_t first = g * w->group, left = columns - first < w->group ? columns - first : w->group;
        float largest = 0;
        for (int64_t k = 0; k < left; k++) {
            const float size = __builtin_fabsf(x[first + k]);
            largest = size > largest ? size : largest;
        }
        const float inverse = largest > 0x1p-120f ? 127 / largest : 0; /* of anything smaller it would be infinite */
        int32_t total = 0;
        for (int64_t k = 0; k < left; k++) {
            const int8_t nearest = (int8_t)LEVEL(nearest)(x[first + k] * inverse);
            code[first + k] = nearest;
            total += nearest;
        }
        memset(code + first + left, 0, w->group - left);
        /* what is not finite must come out as what is not finite */
        float check = 0;
        for (int64_t k = 0; k < left; k++) check += x[first + k] * 0;
        group[g].scale = largest / 127 + check;
        group[g].sum = w->kind == KIND_INT4_MINIMUM ? total : -LEVEL(zero_of)(w->kind) * total;
    }
}

INLINE vf LEVEL(sigmoid)(vf x) { return 1.0f / (1.0f + LEVEL(exponential)(-x)); }

INLINE vf LEVEL(activated)(int32_t activation, float limit, vf g, vf u) {
    switch (activation) {
    case ACT_SILU: return g * LEVEL(sigmoid)(g) * u;
    case ACT_RELU: return LEVEL(choose)(g <= 0, (vf){}, g) * u;
    case ACT_GELU_TANH: return g * LEVEL(sigmoid)(1.5957691216f * (g + 0.044715f * g * g * g)) * u;
    case ACT_GELU:
        for (int n = 0; n < LANES; n++) g[n] = 0.5f * g[n] * (1 + erff(g[n] * 0.70710678f)) * u[n];
        return g;
    case ACT_CLAMPED:
        g = LEVEL(choose)(g > limit, (vf){} + limit, g);
        u = LEVEL(choose)(u > limit, (vf){} + limit, LEVEL(choose)(u < -limit, (vf){} - limit, u));
        return (u + 1.0f) * g * LEVEL(sigmoid)(1.702f * g);
    default: return g * u;
    }
}

static void LEVEL(activate)(int32_t activation, float limit, const float *gate, const float *up, float *hidden) {
    for (int n = 0; n < ROWS; n += LANES) {
        vf g, u = (vf){} + 1.0f;
        memcpy(&g, gate + n, sizeof g);
        if (up) memcpy(&u, up + n, sizeof u);
        const vf y = LEVEL(activated)(activation, limit, g, u);
        memcpy(hidden + n, &y, sizeof y);
    }
}

static float LEVEL(peak)(int32_t integers, int64_t rounds) {
    vi whole[CHAINS * PARTS], weight = (vi){} + 0x01020304 + (int32_t)(rounds & 1);
    vf real[CHAINS * PARTS], factor = (vf){} + 0.999f;
    const int8_t x[4] = {1, -1, 2, -2};
    for (int i = 0; i < CHAINS * PARTS; i++) {
        whole[i] = (vi){} + i;
        real[i] = (vf){} + (float)i;
    }
    if (integers)
        for (int64_t r = 0; r < rounds; r++)
#if DOT_PAIRS
            for (int i = 0; i < CHAINS * PARTS; i++) whole[i] = dot_pairs(whole[i], weight, x);
#else
            for (int i = 0; i < CHAINS * PARTS; i++) whole[i] = dot4(whole[i], weight, x);
#endif
    else
        for (int64_t r = 0; r < rounds; r++)
            for (int i = 0; i < CHAINS * PARTS; i++) real[i] = real[i] * factor + factor;
    float sum = 0;
    for (int i = 0; i < CHAINS * PARTS; i++)
        for (int n = 0; n < LANES; n++) sum += (float)whole[i][n] + real[i][n];
    return sum;
}

INLINE void LEVEL(dots_of)(const float *const *x, int count, const float *w, int64_t columns, float *out) {
    vf sum[4][2];
    for (int i = 0; i < count; i++) sum[i][0] = sum[i][1] = (vf){};
    int64_t k = 0;
    for (; k + 2 * LANES <= columns; k += 2 * LANES)
        for (int half = 0; half < 2; half++) {
            vf weight, number;
            memcpy(&weight, w + k + half * LANES, sizeof weight);
            for (int i = 0; i < count; i++) {
                memcpy(&number, x[i] + k + half * LANES, sizeof number);
                sum[i][half] += weight * number;
            }
        }
    for (int i = 0; i < count; i++) {
        const vf both = sum[i][0] + sum[i][1];
        float total = 0;
        for (int n = 0; n < LANES; n++) total += both[n];
        for (int64_t rest = k; rest < columns; rest++) total += w[rest] * x[i][rest];
        out[i] = total;
    }
}

static void LEVEL(dots)(const float *const *x, int32_t count, const float *w, int64_t columns, float *out) {
    if (count == 4) {
        LEVEL(dots_of)(x, 4, w, columns, out);
        return;
    }
    for (int32_t i = 0; i < count; i++) LEVEL(dots_of)(x + i, 1, w, columns, out + i);
}

/* Weights of a column, of as many rows as there are. */
INLINE void LEVEL(put)(vf weight, int64_t rows, int32_t half, char *to) {
    const size_t count = rows < LANES ? (size_t)rows : LANES;
    if (!half) {
        memcpy(to, &weight, count == LANES ? sizeof weight : count * 4);
        return;
    }
    const vu bits = (vu)weight; /* to the nearest, halves to the even one */
    const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const vh halves = __builtin_convertvector(rounded, vh);
    memcpy(to, &halves, count == LANES ? sizeof halves : count * 2);
}

/* A part of a tile's rows, of which there are `rows`. */
INLINE void LEVEL(unpack_part)(int kind, const matrix *w, const uint8_t *tile, int part, int64_t columns, int64_t rows,
                               int32_t half, char *to, int64_t stride) {
    const int bits = kind == KIND_FLOAT32 ? 32 : kind == KIND_BFLOAT16 ? 16 : kind == KIND_FLOAT8 || kind == KIND_INT8 ? 8 : 4;
    const uint8_t *at = tile + ROWS * w->group * bits / 8;
    vf scales = (vf){} + 1.0f, minimum = {};
    if (kind > KIND_BFLOAT16) scales = LEVEL(scales)(kind, at, part);
    if (kind == KIND_INT4_MINIMUM) minimum = widen_halves(at + 2 * ROWS + 2 * LANES * part);
    if (!is_integer(kind)) {
        for (int64_t k = 0; k < columns; k++)
            LEVEL(put)(LEVEL(floats)(kind, w->group, tile, (int)k, part) * scales, rows, half, to + k * stride);
        return;
    }
    for (int64_t first = 0; first < columns; first += 4) {
        const vu line = (vu)LEVEL(integers)(kind, w->group, tile, (int)first / 4, part);
        for (int64_t k = first; k < first + 4 && k < columns; k++) {
            const vi code = (vi)(line >> (uint32_t)(8 * (k - first)) & 0xff) - LEVEL(zero_of)(kind);
            vf weight = __builtin_convertvector(code, vf) * scales;
            if (kind == KIND_INT4_MINIMUM) weight += minimum;
            LEVEL(put)(weight, rows, half, to + k * stride);
        }
    }
}

INLINE void LEVEL(unpack_kind)(int kind, const matrix *w, const uint8_t *tile, int64_t columns, int64_t rows, int32_t half,
                               char *to, int64_t stride) {
    for (int part = 0; part < PARTS && LANES * part < rows; part++)
        LEVEL(unpack_part)(kind, w, tile, part, columns, rows - LANES * part, half, to + LANES * part * (half ? 2 : 4), stride);
}

static void LEVEL(unpack)(const matrix *w, const uint8_t *tile, int64_t columns, int64_t rows, int32_t half, char *to,
                          int64_t stride) {
#define UNPACK(kind) case kind: LEVEL(unpack_kind)(kind, w, tile, columns, rows, half, to, stride); break
    switch (w->kind) {
        UNPACK(KIND_FLOAT32);
        UNPACK(KIND_BFLOAT16);
        UNPACK(KIND_FLOAT8);
        UNPACK(KIND_INT8);
        UNPACK(KIND_INT4);
        UNPACK(KIND_INT4_MINIMUM);
        UNPACK(KIND_MXFP4);
    default: LEVEL(unpack_kind)(KIND_NF4, w, tile, columns, rows, half, to, stride);
    }
#undef UNPACK
}
