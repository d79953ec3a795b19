/* The products of one level. Included by a file that has set what its instruction set needs:
 *
 *   LEVEL(name)   the name with the level's suffix
 *   AT_ONCE       how many rows share an unpacked piece of a tile: as many as registers allow
 *   dot4, dot4_wide   to each lane of sums the products of its 4 unsigned bytes with 4 signed ones; wide: of all 8 bits
 *   lookup_bytes, lookup_floats, widen_halves
 *
 * A vector is 16 lanes of 32 bits, one for each row of a tile; gcc and clang cut it to the registers there are. Every
 * output is summed in the same order whatever the number of rows, so results do not depend on what else is in a batch. */

#define LINES 8 /* 64-byte lines unpacked at once: 32 columns of integers, 8 of floats */

/* What one tile's scales are: of 16 rows. */
INLINE vf LEVEL(scales)(int kind, const uint8_t *at) {
    if (kind != KIND_MXFP4) return widen_halves(at);
    vb bytes;
    memcpy(&bytes, at, sizeof bytes);
    const vi power = __builtin_convertvector(bytes, vi);
    /* 2 ** (power - 127), and half of it because the table holds doubled numbers; 0 means 2 ** -127 */
    vf half = (vf)(power << 23) * 0.5f;
    return pick(power == 0, (vf){} + 0x1p-128f, half);
}

INLINE int LEVEL(zero_of)(int kind) {
    return kind == KIND_INT8 ? 128 : kind == KIND_INT4 ? 8 : kind == KIND_MXFP4 ? 12 : 0;
}

/* Columns 32 part .. 32 part + 31 of an integer tile, as unsigned bytes in the order that dot4 wants. */
INLINE void LEVEL(integers)(int kind, int group, const uint8_t *tile, int part, vi w[LINES]) {
    if (kind == KIND_INT8) {
        for (int j = 0; j < LINES; j++) w[j] = load_line(tile + 64 * (LINES * part + j));
        return;
    }
    const vi low = (vi){} + 0x0f0f0f0f;
    if (group == 32) {
        for (int j = 0; j < LINES / 2; j++) {
            const vi both = load_line(tile + 64 * j);
            w[j] = both & low;
            w[j + LINES / 2] = (vi)((vu)both >> 4) & low;
        }
    } else {
        const int lines = group / 8, first = LINES * part;
        const int high = first >= lines;
        for (int j = 0; j < LINES; j++) {
            const vi both = load_line(tile + 64 * (first - high * lines + j));
            w[j] = (high ? (vi)((vu)both >> 4) : both) & low;
        }
    }
    if (kind == KIND_MXFP4) {
        static const uint8_t doubled[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* plus 12 */
        for (int j = 0; j < LINES; j++) w[j] = lookup_bytes(doubled, w[j]);
    }
}

/* Columns 8 part .. 8 part + 7 of a floating point tile. */
INLINE void LEVEL(floats)(int kind, int group, const uint8_t *tile, int part, vf w[LINES]) {
    if (kind == KIND_FLOAT32) {
        for (int j = 0; j < LINES; j++) w[j] = (vf)load_line(tile + 64 * (LINES * part + j));
    } else if (kind == KIND_BFLOAT16) {
        for (int j = 0; j < LINES / 2; j++) {
            const vi pair = load_line(tile + 64 * (LINES / 2 * part + j));
            w[2 * j] = (vf)(pair << 16);
            w[2 * j + 1] = (vf)(pair & (vi)((vu){} + 0xffff0000u));
        }
    } else if (kind == KIND_FLOAT8) {
        for (int j = 0; j < LINES; j++) { /* 4 columns of 16 rows in a line */
            const vi code = (vi)((vu)load_line(tile + 64 * (2 * part + j / 4)) >> (8 * (j % 4)));
            /* the exponent's bias is 7 there and 127 here: 2 ** 120 */
            w[j] = (vf)((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
        }
    } else {
        static const float quantile[16] = MOIETY_NF4;
        const int line = 2 * part % (group / 8), high = 2 * part >= group / 8;
        for (int j = 0; j < LINES; j++) {
            const vi code = (vi)((vu)load_line(tile + 64 * (line + j / 4)) >> (8 * (j % 4) + 4 * high)) & 15;
            w[j] = lookup_floats(quantile, code);
        }
    }
}

INLINE void LEVEL(integer_rows)(int kind, int group, const matrix *w, const uint8_t *tile, const operand *x,
                                const int64_t *row, int count, float (*out)[ROWS]) {
    vf total[AT_ONCE];
    const int8_t *code[AT_ONCE];
    const float *scale[AT_ONCE];
    const int32_t *sum[AT_ONCE];
    for (int i = 0; i < count; i++) {
        total[i] = (vf){};
        code[i] = x->code + row[i] * x->width;
        scale[i] = x->scale + row[i] * x->groups;
        sum[i] = x->sum + row[i] * x->groups;
    }
    const int code_bytes = kind == KIND_INT8 ? ROWS * group : ROWS * group / 2;
    const int scale_bytes = kind == KIND_MXFP4 ? ROWS : 2 * ROWS;
    const int tile_bytes = code_bytes + scale_bytes + (kind == KIND_INT4_MINIMUM ? 2 * ROWS : 0);
    for (int64_t g = 0; g < w->groups; g++, tile += tile_bytes) {
        if (count <= 2)
            for (int ahead = 0; ahead < tile_bytes; ahead += 64) __builtin_prefetch(tile + PREFETCH_BYTES + ahead, 0, 3);
        vi inner[AT_ONCE];
        for (int i = 0; i < count; i++) inner[i] = (vi){} - LEVEL(zero_of)(kind) * sum[i][g];
        for (int part = 0; part < group / 32; part++) {
            vi line[LINES];
            LEVEL(integers)(kind, group, tile, part, line);
            for (int i = 0; i < count; i++) {
                const int8_t *at = code[i] + g * group + 32 * part;
                for (int j = 0; j < LINES; j++)
                    inner[i] = kind == KIND_INT8 ? dot4_wide(inner[i], line[j], at + 4 * j) : dot4(inner[i], line[j], at + 4 * j);
            }
        }
        const vf scales = LEVEL(scales)(kind, tile + code_bytes);
        vf minimum = {};
        if (kind == KIND_INT4_MINIMUM) minimum = widen_halves(tile + code_bytes + scale_bytes);
        for (int i = 0; i < count; i++) {
            total[i] += __builtin_convertvector(inner[i], vf) * (scales * scale[i][g]);
            if (kind == KIND_INT4_MINIMUM) total[i] += minimum * (scale[i][g] * (float)sum[i][g]);
        }
    }
    for (int i = 0; i < count; i++) memcpy(out[i], &total[i], sizeof total[i]);
}

INLINE void LEVEL(float_rows)(int kind, int group, const matrix *w, const uint8_t *tile, const operand *x,
                              const int64_t *row, int count, float (*out)[ROWS]) {
    vf total[AT_ONCE];
    const float *value[AT_ONCE];
    for (int i = 0; i < count; i++) {
        total[i] = (vf){};
        value[i] = x->value + row[i] * x->width;
    }
    for (int64_t g = 0; g < w->groups; g++, tile += w->tile_bytes) {
        if (count <= 2)
            for (int ahead = 0; ahead < w->tile_bytes; ahead += 64) __builtin_prefetch(tile + PREFETCH_BYTES + ahead, 0, 3);
        vf inner[AT_ONCE];
        for (int i = 0; i < count; i++) inner[i] = (vf){};
        for (int part = 0; part < group / LINES; part++) {
            vf line[LINES];
            LEVEL(floats)(kind, group, tile, part, line);
            for (int i = 0; i < count; i++) {
                const float *at = value[i] + g * group + LINES * part;
                for (int j = 0; j < LINES; j++) inner[i] += line[j] * at[j];
            }
        }
        if (kind == KIND_FLOAT8 || kind == KIND_NF4) {
            const vf scales = widen_halves(tile + w->tile_bytes - 2 * ROWS);
            for (int i = 0; i < count; i++) total[i] += inner[i] * scales;
        } else {
            for (int i = 0; i < count; i++) total[i] += inner[i];
        }
    }
    for (int i = 0; i < count; i++) memcpy(out[i], &total[i], sizeof total[i]);
}

/* AT_ONCE rows at a time; the compiler makes one loop for a full set and one for a single row. */
#define ROWS_OF(kind, group, rows)                                                                                     \
    do {                                                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + AT_ONCE <= count; i += AT_ONCE) LEVEL(rows)(kind, group, w, tiles, x, row + i, AT_ONCE, out + i);   \
        if (AT_ONCE > 4 && i + 4 <= count) {                                                                           \
            LEVEL(rows)(kind, group, w, tiles, x, row + i, AT_ONCE > 4 ? 4 : 1, out + i);                              \
            i += 4;                                                                                                    \
        }                                                                                                              \
        for (; i < count; i++) LEVEL(rows)(kind, group, w, tiles, x, row + i, 1, out + i);                             \
    } while (0)
#define BY_GROUP(kind, rows)                                                                                           \
    do {                                                                                                               \
        if (w->group == 32) ROWS_OF(kind, 32, rows);                                                                   \
        else if (w->group == 64) ROWS_OF(kind, 64, rows);                                                              \
        else ROWS_OF(kind, 128, rows);                                                                                 \
    } while (0)

static void LEVEL(product)(const matrix *w, const uint8_t *tiles, const operand *x, const int64_t *row, int64_t count,
                           float (*out)[ROWS]) {
    switch (w->kind) {
    case KIND_FLOAT32: ROWS_OF(KIND_FLOAT32, 16, float_rows); break;
    case KIND_BFLOAT16: ROWS_OF(KIND_BFLOAT16, 32, float_rows); break;
    case KIND_FLOAT8: ROWS_OF(KIND_FLOAT8, 128, float_rows); break;
    case KIND_NF4: BY_GROUP(KIND_NF4, float_rows); break;
    case KIND_INT8: BY_GROUP(KIND_INT8, integer_rows); break;
    case KIND_INT4: BY_GROUP(KIND_INT4, integer_rows); break;
    case KIND_INT4_MINIMUM: BY_GROUP(KIND_INT4_MINIMUM, integer_rows); break;
    default: ROWS_OF(KIND_MXFP4, 32, integer_rows); break;
    }
}

/* To the nearest whole number, halves to the even one, for |x| < 2 ** 22. */
INLINE int32_t LEVEL(nearest)(float x) {
    union { float number; int32_t bits; } shifted = {.number = x + 0x1.8p23f};
    return shifted.bits - 0x4b400000;
}

static void LEVEL(prepare)(const matrix *w, const float *x, int8_t *code, float *value, float *scale, int32_t *sum) {
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
        const float inverse = largest > 0 ? 127 / largest : 0;
        int32_t total = 0;
        for (int64_t k = 0; k < left; k++) {
            const int32_t nearest = LEVEL(nearest)(x[first + k] * inverse);
            code[first + k] = (int8_t)nearest;
            total += nearest;
        }
        memset(code + first + left, 0, w->group - left);
        /* what is not finite must come out as what is not finite */
        float check = 0;
        for (int64_t k = 0; k < left; k++) check += x[first + k] * 0;
        scale[g] = largest / 127 + check;
        sum[g] = total;
    }
}

/* exp by 2 ** whole * 2 ** rest, the rest by a polynomial; relative error below 2e-7. */
INLINE vf LEVEL(exponential)(vf x) {
    const vf low = (vf){} - 87.0f, high = (vf){} + 88.0f;
    const vf bounded = pick(x < low, low, pick(x > high, high, x));
    const vf shifted = bounded * 1.44269504f + 0x1.8p23f;
    const vf whole = shifted - 0x1.8p23f;
    const vf rest = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
    vf p = rest * (1.0f / 5040) + 1.0f / 720;
    p = p * rest + 1.0f / 120;
    p = p * rest + 1.0f / 24;
    p = p * rest + 1.0f / 6;
    p = p * rest + 0.5f;
    p = p * rest + 1.0f;
    p = p * rest + 1.0f;
    const vi power = ((vi)shifted - 0x4b400000 + 127) << 23;
    return pick(x != x, x, p * (vf)power); /* not a number stays one */
}

INLINE vf LEVEL(sigmoid)(vf x) { return 1.0f / (1.0f + LEVEL(exponential)(-x)); }

static void LEVEL(activate)(int32_t activation, float limit, const float *gate, const float *up, float *hidden) {
    vf g, u = (vf){} + 1.0f, y;
    memcpy(&g, gate, sizeof g);
    if (up) memcpy(&u, up, sizeof u);
    switch (activation) {
    case ACT_SILU: y = g * LEVEL(sigmoid)(g) * u; break;
    case ACT_RELU: y = pick(g <= 0, (vf){}, g) * u; break;
    case ACT_GELU_TANH: y = g * LEVEL(sigmoid)(1.5957691216f * (g + 0.044715f * g * g * g)) * u; break;
    case ACT_GELU:
        for (int n = 0; n < ROWS; n++) y[n] = 0.5f * g[n] * (1 + erff(g[n] * 0.70710678f)) * u[n];
        break;
    case ACT_CLAMPED:
        g = pick(g > limit, (vf){} + limit, g);
        u = pick(u > limit, (vf){} + limit, pick(u < -limit, (vf){} - limit, u));
        y = (u + 1.0f) * g * LEVEL(sigmoid)(1.702f * g);
        break;
    default: y = g * u;
    }
    memcpy(hidden, &y, sizeof y);
}
