/* Processors with AMX: integer weights for several rows of an expert meet them in tiles, 16 x 64 x 16 products in one
 * instruction. Sums of groups are whole numbers and are drained as tile.h drains them, so every output has the bits that the
 * AVX-512 level gives it, which does everything else here:
 * - few rows of an expert, for which reading the weights is what takes time;
 * - weights that are floats. Tiles would need activations rounded to bfloat16, and rows would depend on how many there are.
 * This file has run in emulation only (-DMOIETY_EMULATE_AMX, tests/backends/test_cpu_builds.py), never on such a processor. */
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wunused-function" /* of tile.h, the product with vectors */
#endif
#include <immintrin.h>

#define LEVEL_NAME amx
#include "vectors.h"
#include "avx512.h"
#include "amx.h"

#define FEW 4       /* rows; fewer are left to vectors */
#define SET 32      /* rows that share what is in two tiles of weights */
#define COLUMNS 512 /* worked on by all rows before the next, so that they stay in the first cache */

/* Two row blocks of some columns, as tiles are loaded from them. */
typedef struct {
    uint8_t line[2][COLUMNS / 4][64]; /* byte 4 n + i has row n, column 4 j + i, plus the code of zero */
    vf scale[2][COLUMNS / 32], minimum[2][COLUMNS / 32];
} unpacked;

INLINE void unpack_tile(int kind, int group, const uint8_t *tile, int64_t number, int b, unpacked *into) {
    for (int quad = 0; quad < group / 4; quad++) {
        const vi line = LEVEL(integers)(kind, group, tile, quad, 0);
        memcpy(into->line[b][number * (group / 4) + quad], &line, sizeof line);
    }
    const uint8_t *scales = tile + ROWS * group / (kind == KIND_INT8 ? 1 : 2);
    into->scale[b][number] = LEVEL(scales)(kind, scales, 0);
    if (kind == KIND_INT4_MINIMUM) into->minimum[b][number] = widen_halves(scales + 2 * ROWS);
}

INLINE void unpack_kind(int kind, const matrix *w, const uint8_t *tile, int64_t number, int b, unpacked *into) {
    if (w->group == 32) unpack_tile(kind, 32, tile, number, b, into);
    else if (w->group == 64) unpack_tile(kind, 64, tile, number, b, into);
    else unpack_tile(kind, 128, tile, number, b, into);
}

static void unpack_groups(const matrix *w, const uint8_t *tiles, int32_t blocks, int64_t from, int64_t to, unpacked *into) {
    const int64_t next = w->groups * w->tile_bytes;
    for (int64_t g = from; g < to; g++) {
        const uint8_t *tile = tiles + g * w->tile_bytes;
        LEVEL(fetch)(tile, w->tile_bytes, g, blocks, next, (blocks - 1) * next);
        for (int b = 0; b < blocks; b++) {
            const uint8_t *at = tile + b * next;
            if (w->kind == KIND_INT8) unpack_kind(KIND_INT8, w, at, g - from, b, into);
            else if (w->kind == KIND_INT4) unpack_kind(KIND_INT4, w, at, g - from, b, into);
            else if (w->kind == KIND_INT4_MINIMUM) unpack_kind(KIND_INT4_MINIMUM, w, at, g - from, b, into);
            else unpack_tile(KIND_MXFP4, 32, at, g - from, b, into);
        }
    }
}

/* Tiles 0 to 3 are sums, 2 for each of two halves of a set of rows; 4 and 5 the halves' codes, 6 and 7 weights of two blocks. */
static void shape_tiles(int64_t first, int64_t second, int32_t group) {
    const int bytes = group < 64 ? group : 64;
    tile_configuration config = {.palette = 1};
    for (int n = 0; n < TILES; n++) {
        const int64_t rows = n >= 6 ? bytes / 4 : n == 4 || n < 2 ? first : second;
        config.rows[n] = (uint8_t)rows;
        config.row_bytes[n] = (uint16_t)(!rows ? 0 : n == 4 || n == 5 ? bytes : 64);
    }
    tile_configure(&config);
}

/* Sums of one group of columns, (block, row, 16). `width` is the step from row to row of the codes. */
INLINE void multiply_group(int blocks, int halves, int group, const int8_t *code, int64_t width,
                           const uint8_t (*const line[2])[64], int32_t (*sum)[SET][ROWS]) {
    tile_zero(0);
    if (blocks == 2) tile_zero(1);
    if (halves == 2) tile_zero(2);
    if (blocks == 2 && halves == 2) tile_zero(3);
    for (int k = 0; k < group; k += 64) {
        tile_load(6, line[0][k / 4], 64);
        tile_load(4, code + k, width);
        tile_multiply(0, 4, 6);
        if (blocks == 2) {
            tile_load(7, line[1][k / 4], 64);
            tile_multiply(1, 4, 7);
        }
        if (halves == 2) {
            tile_load(5, code + ROWS * width + k, width);
            tile_multiply(2, 5, 6);
            if (blocks == 2) tile_multiply(3, 5, 7);
        }
    }
    tile_store(0, sum[0][0], 64);
    if (blocks == 2) tile_store(1, sum[1][0], 64);
    if (halves == 2) tile_store(2, sum[0][ROWS], 64);
    if (blocks == 2 && halves == 2) tile_store(3, sum[1][ROWS], 64);
}

/* The groups from .. to - 1 of `count` rows, at most SET, added to out[b][0 .. count - 1]. */
INLINE void rows_of_groups(int blocks, int halves, const matrix *w, const unpacked *weights, const operand *x,
                           const int64_t *row, int64_t count, int64_t from, int64_t to, float (*const out[2])[ROWS]) {
    int8_t gathered[SET][COLUMNS] __attribute__((aligned(64)));
    int32_t sum[2][SET][ROWS] __attribute__((aligned(64)));
    const int8_t *code = x->code + row[0] * x->width + from * w->group;
    int64_t width = x->width, i = 1;
    while (i < count && row[i] == row[0] + i) i++;
    if (i < count) { /* tiles are loaded from rows at equal distances */
        for (i = 0; i < count; i++) memcpy(gathered[i], x->code + row[i] * x->width + from * w->group, (to - from) * w->group);
        code = gathered[0], width = COLUMNS;
    }
    for (int64_t g = from; g < to; g++) {
        const int64_t line = (g - from) * (w->group / 4);
        const uint8_t(*const lines[2])[64] = {weights->line[0] + line, weights->line[1] + line};
        multiply_group(blocks, halves, w->group, code + (g - from) * w->group, width, lines, sum);
        for (int b = 0; b < blocks; b++) {
            const vf scales = weights->scale[b][g - from];
            for (i = 0; i < count; i++) {
                const code_group *at = x->group + row[i] * x->groups + g;
                vf total = {};
                vi inner;
                if (g) memcpy(&total, out[b][i], sizeof total);
                memcpy(&inner, sum[b][i], sizeof inner);
                if (w->kind != KIND_INT4_MINIMUM) inner += at->sum;
                total += __builtin_convertvector(inner, vf) * (scales * at->scale);
                if (w->kind == KIND_INT4_MINIMUM) total += weights->minimum[b][g - from] * (at->scale * (float)at->sum);
                memcpy(out[b][i], &total, sizeof total);
            }
        }
    }
}

static void tiles_product(const matrix *w, const uint8_t *tiles, int32_t blocks, const operand *x, const int64_t *row,
                          int64_t count, float (*const *out)[ROWS]) {
    if (!is_integer(w->kind) || count < FEW) {
        avx512_table.product(w, tiles, blocks, x, row, count, out);
        return;
    }
    unpacked weights;
    int64_t shaped = 0;
    const int64_t piece = COLUMNS / w->group;
    for (int64_t from = 0; from < w->groups; from += piece) {
        const int64_t to = from + piece < w->groups ? from + piece : w->groups;
        unpack_groups(w, tiles, blocks, from, to, &weights);
        for (int64_t first = 0; first < count; first += SET) {
            const int64_t rows = count - first < SET ? count - first : SET, second = rows > ROWS ? rows - ROWS : 0;
            float(*const at[2])[ROWS] = {out[0] + first, out[1] + first};
            if (rows != shaped) shape_tiles(rows - second, second, w->group);
            shaped = rows;
            if (blocks == 2 && second) rows_of_groups(2, 2, w, &weights, x, row + first, rows, from, to, at);
            else if (blocks == 2) rows_of_groups(2, 1, w, &weights, x, row + first, rows, from, to, at);
            else if (second) rows_of_groups(1, 2, w, &weights, x, row + first, rows, from, to, at);
            else rows_of_groups(1, 1, w, &weights, x, row + first, rows, from, to, at);
        }
    }
    tile_release();
}

/* As many operations as `rounds` of CHAINS vectors: 1024 of them are 4 products of tiles. */
static float tiles_peak(int32_t integers, int64_t rounds) {
    if (!integers) return avx512_table.peak(0, rounds);
    int8_t byte[ROWS][64];
    int32_t sum[ROWS][ROWS];
    memset(byte, 1 + (int)(rounds & 1), sizeof byte);
    shape_tiles(ROWS, ROWS, 64);
    tile_load(4, byte, 64);
    tile_load(6, byte, 64);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int64_t r = 0; r < rounds * CHAINS / 1024; r++) {
        tile_multiply(0, 4, 6);
        tile_multiply(1, 4, 6);
        tile_multiply(2, 4, 6);
        tile_multiply(3, 4, 6);
    }
    tile_store(3, sum, 64);
    tile_release();
    return (float)sum[ROWS - 1][ROWS - 1];
}

const level_table amx_table = {tiles_product, amx_prepare, amx_activate, tiles_peak, CHAINS, amx_dots, amx_unpack};
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int not_this_processor;
#endif
