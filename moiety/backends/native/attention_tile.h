/* Attention at one level: included by attention.c through levels.h. Everything that becomes vector code is in here, for gcc
 * cuts vectors before it inlines.
 *
 * A query's sums run over absolute segments of keys from position 0, and inside over keys in order, whatever other queries
 * are computed with it: results do not depend on the batch, on the pieces a prompt came in, or on which pages it has. What
 * rounds in more than one way (a product and a sum in one step, or not) is in functions that are compiled once. */

#include "lanes.h"

#define PARTS (BLOCK / LANES) /* vectors of a block's scores */
/* Queries at once, and the vectors of sums that registers hold. */
#if LANES == 16
#define ROWS_AT_ONCE 8
#define SUMS 16
#else
#define ROWS_AT_ONCE (LANES / 2)
#define SUMS 8
#endif

/* 1 / sqrt(mean(x^2) + eps) */
static __attribute__((noinline)) float LEVEL(inverse_size)(const float *x, int64_t width, float eps) {
    vf total[4] = {{}, {}, {}, {}};
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int n = 0; n < 4; n++) total[n] += LEVEL(load)(x + i + n * LANES) * LEVEL(load)(x + i + n * LANES);
    for (; i + LANES <= width; i += LANES) total[0] += LEVEL(load)(x + i) * LEVEL(load)(x + i);
    float squares = LEVEL(sum)((total[0] + total[1]) + (total[2] + total[3]));
    for (; i < width; i++) squares += x[i] * x[i];
    return 1.0f / sqrtf(squares / (float)width + eps);
}

/* to = from * factor * weight; weight may be NULL, from and to the same. */
static __attribute__((noinline)) void LEVEL(scaled)(float *to, const float *from, float factor, const float *weight, int64_t width) {
    if (weight)
        for (int64_t i = 0; i < width; i++) to[i] = from[i] * factor * weight[i];
    else
        for (int64_t i = 0; i < width; i++) to[i] = from[i] * factor;
}

static void LEVEL(turn)(float *x, const float *cos, const float *sin, int64_t pairs, int32_t interleaved) {
    if (interleaved)
        for (int64_t i = 0; i < pairs; i++) {
            const float one = x[2 * i], other = x[2 * i + 1];
            x[2 * i] = one * cos[i] - other * sin[i];
            x[2 * i + 1] = other * cos[i] + one * sin[i];
        }
    else
        for (int64_t i = 0; i < pairs; i++) {
            const float one = x[i], other = x[i + pairs];
            x[i] = one * cos[i] - other * sin[i];
            x[i + pairs] = other * cos[i] + one * sin[i];
        }
}

INLINE void LEVEL(clip)(float *x, float bound, int64_t width) {
    if (bound != 0)
        for (int64_t i = 0; i < width; i++) x[i] = x[i] > bound ? bound : x[i] < -bound ? -bound : x[i];
}

/* One head of a query or key, as the layer's options have it: into y. */
static void LEVEL(prepared)(const attention_job *j, int64_t token, const float *x, float *y, const float *weight, int64_t head,
                            float full) {
    const attention_layer *a = j->layer;
    const int64_t d = a->head_dim;
    LEVEL(scaled)(y, x, full, a->norm == NORM_FULL ? weight + head * d : NULL, d);
    LEVEL(clip)(y, a->clip, d);
    if (a->norm == NORM_HEAD) LEVEL(scaled)(y, y, LEVEL(inverse_size)(y, d, a->norm_eps), weight, d);
    if (a->pairs) LEVEL(turn)(y, j->step->cos + token * a->pairs, j->step->sin + token * a->pairs, a->pairs, a->interleaved);
    if (a->norm == NORM_HEAD_ROTATED) LEVEL(scaled)(y, y, LEVEL(inverse_size)(y, d, a->norm_eps), weight, d);
    if (a->norm == NORM_UNIT_ROTATED) LEVEL(scaled)(y, y, LEVEL(inverse_size)(y, d, a->norm_eps), NULL, d);
}

INLINE uint16_t LEVEL(rounded)(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Numbers to memory, `stride` apart. */
INLINE void LEVEL(keep)(char *to, const float *x, int64_t width, int64_t stride, int32_t bfloat16) {
    if (bfloat16)
        for (int64_t i = 0; i < width; i++) ((uint16_t *)to)[i * stride] = LEVEL(rounded)(x[i]);
    else
        for (int64_t i = 0; i < width; i++) ((float *)to)[i * stride] = x[i];
}

/* Queries of one piece of a token to `out`, its keys and values to their page. */
static void LEVEL(prepare_token)(void *job, int64_t number) {
    const attention_job *j = job;
    const attention_layer *a = j->layer;
    const attention_step *s = j->step;
    const int64_t token = number / j->pieces, piece = number % j->pieces, d = a->head_dim, sequence = s->sequence[token];
    const float *q = j->qkv + token * (a->heads + 2 * a->kv_heads) * d, *k = q + a->heads * d, *v = k + a->kv_heads * d;
    const int full = a->norm == NORM_FULL;
    const float q_size = full ? LEVEL(inverse_size)(q, a->heads * d, a->norm_eps) : 1;
    const float k_size = full ? LEVEL(inverse_size)(k, a->kv_heads * d, a->norm_eps) : 1;
    const float factor = a->scale * (a->factored ? s->query_factor[token] : 1);
    for (int64_t h = a->heads * piece / j->pieces; h < a->heads * (piece + 1) / j->pieces; h++) {
        float *y = j->out + (token * a->heads + h) * d;
        LEVEL(prepared)(j, token, q + h * d, y, a->q_norm, h, q_size);
        LEVEL(scaled)(y, y, factor, NULL, d);
    }
    const int64_t position = s->start[sequence] + token - s->first_token[sequence], place = position % a->page_tokens;
    const int64_t page = page_of(s, a, sequence, position), size = a->bfloat16 ? 2 : 4;
    for (int64_t h = a->kv_heads * piece / j->pieces; h < a->kv_heads * (piece + 1) / j->pieces; h++) {
        float y[MOST_HEAD_DIM];
        LEVEL(prepared)(j, token, k + h * d, y, a->k_norm, h, k_size);
        char *keys = a->keys + ((page * a->kv_heads + h) * d * a->page_tokens + place) * size;
        LEVEL(keep)(keys, y, d, a->page_tokens, a->bfloat16);
        memcpy(y, v + h * d, d * sizeof(float));
        LEVEL(clip)(y, a->clip, d);
        LEVEL(keep)(a->values + ((page * a->kv_heads + h) * a->page_tokens + place) * a->value_width * size, y, d, 1, a->bfloat16);
    }
}

/* What the rows of a task have in common, and the running softmax of each. */
typedef struct {
    const attention_layer *layer;
    float q[TASK_FLOATS]; /* (rows, value_width): side by side, for rows of the model's width would share cache lines' places */
    int64_t from[MOST_ROWS], until[MOST_ROWS]; /* the keys that each sees */
    float most[MOST_ROWS], total[MOST_ROWS];   /* largest score so far; sum of the weights, which are relative to it */
    float score[ROWS_AT_ONCE][SEGMENT];
    float sums[TASK_FLOATS]; /* (rows, value_width) weighted values */
    const char *keys[2][BLOCKS], *values[2][BLOCKS]; /* of this segment and the next, which is fetched ahead */
} LEVEL(rows);

/* Scores of `count` queries with the keys of `blocks` blocks. */
INLINE void LEVEL(score_blocks)(LEVEL(rows) *r, int64_t row, int count, int first, int blocks, int bfloat16) {
    vf total[ROWS_AT_ONCE][BLOCKS * PARTS];
    const int vectors = blocks * PARTS, size = bfloat16 ? 2 : 4;
    const int64_t d = r->layer->head_dim, width = r->layer->value_width, stride = r->layer->page_tokens * size;
    const float *q = r->q + row * width;
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vectors; v++) total[i][v] = (vf){};
    for (int64_t n = 0; n < d; n++) {
        vf key[BLOCKS * PARTS];
        for (int v = 0; v < vectors; v++)
            key[v] = LEVEL(stored)(bfloat16, r->keys[0][first + v / PARTS] + n * stride + v % PARTS * LANES * size);
        if (row == 0)
            for (int b = 0; b < blocks; b++) __builtin_prefetch(r->keys[1][first + b] + n * stride, 0, 2);
        for (int i = 0; i < count; i++)
            for (int v = 0; v < vectors; v++) total[i][v] += key[v] * q[i * width + n];
    }
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vectors; v++) memcpy(r->score[i] + BLOCK * first + LANES * v, &total[i][v], sizeof(vf));
}

/* Scores of one row become weights, and its sums become relative to the new largest score. */
static __attribute__((noinline)) void LEVEL(weigh)(LEVEL(rows) *r, int64_t row, int i, int64_t segment) {
    const float cap = r->layer->cap;
    const int64_t width = r->layer->value_width;
    const int32_t from = (int32_t)(r->from[row] > segment ? r->from[row] - segment : 0);
    const int64_t left = r->until[row] - segment;
    const int32_t until = (int32_t)(left < SEGMENT ? left : SEGMENT);
    float *score = r->score[i];
    if (from >= until) {
        memset(score, 0, sizeof r->score[i]);
        return;
    }
    vf best = (vf){} - INFINITY, total = {};
    for (int at = 0; at < SEGMENT; at += LANES) {
        const vi key = LEVEL(numbers)() + at, seen = (key >= from) & (key < until);
        vf s = LEVEL(load)(score + at);
        if (cap != 0) s = LEVEL(capped)(s, cap);
        s = LEVEL(choose)(seen, s, (vf){} - INFINITY);
        best = LEVEL(choose)(s > best, s, best);
        memcpy(score + at, &s, sizeof s);
    }
    const float here = LEVEL(largest)(best), before = r->most[row], most = here > before ? here : before;
    const float correction = here > before ? LEVEL(exponential)((vf){} + (before - here))[0] : 1;
    for (int at = 0; at < SEGMENT; at += LANES) {
        const vi key = LEVEL(numbers)() + at, seen = (key >= from) & (key < until);
        const vf weight = LEVEL(choose)(seen, LEVEL(exponential)(LEVEL(load)(score + at) - most), (vf){});
        total += weight;
        memcpy(score + at, &weight, sizeof weight);
    }
    r->total[row] = r->total[row] * correction + LEVEL(sum)(total);
    r->most[row] = most;
    float *sums = r->sums + row * width;
    if (correction != 1)
        for (int64_t n = 0; n < width; n += LANES) {
            const vf y = LEVEL(load)(sums + n) * correction;
            memcpy(sums + n, &y, sizeof y);
        }
}

/* sums += weight * value for keys from .. until - 1 of a segment and `chunks` vectors of every value. */
INLINE void LEVEL(add_values)(LEVEL(rows) *r, int64_t row, int count, int64_t at, int chunks, int from, int until, int bfloat16) {
    const int64_t width = r->layer->value_width, size = bfloat16 ? 2 : 4;
    vf total[ROWS_AT_ONCE][SUMS];
    for (int i = 0; i < count; i++)
        for (int c = 0; c < chunks; c++) total[i][c] = LEVEL(load)(r->sums + (row + i) * width + at + LANES * c);
    for (int n = from; n < until; n++) {
        const int64_t place = ((n % BLOCK) * width + at) * size;
        const char *value = r->values[0][n / BLOCK] + place;
        if (row == 0)
            for (int64_t ahead = 0; ahead < chunks * LANES * size; ahead += 64)
                __builtin_prefetch(r->values[1][n / BLOCK] + place + ahead, 0, 2);
        vf v[SUMS];
        for (int c = 0; c < chunks; c++) v[c] = LEVEL(stored)(bfloat16, value + LANES * c * size);
        for (int i = 0; i < count; i++)
            for (int c = 0; c < chunks; c++) total[i][c] += v[c] * r->score[i][n];
    }
    for (int i = 0; i < count; i++)
        for (int c = 0; c < chunks; c++) memcpy(r->sums + (row + i) * width + at + LANES * c, &total[i][c], sizeof(vf));
}

/* One segment for `count` rows, which is a constant wherever this is inlined. */
INLINE void LEVEL(segment_rows)(LEVEL(rows) *r, int64_t row, int count, int64_t segment, int bfloat16) {
    const int blocks = SUMS / count / PARTS < BLOCKS ? SUMS / count / PARTS : BLOCKS;
    for (int first = 0; first < BLOCKS; first += blocks) LEVEL(score_blocks)(r, row, count, first, blocks, bfloat16);
    int64_t from = SEGMENT, until = 0;
    for (int i = 0; i < count; i++) {
        LEVEL(weigh)(r, row + i, i, segment);
        const int64_t low = r->from[row + i] - segment, high = r->until[row + i] - segment;
        from = low < from ? low : from;
        until = high > until ? high : until;
    }
    from = from > 0 ? from : 0;
    until = until < SEGMENT ? until : SEGMENT;
    const int64_t width = r->layer->value_width;
    int64_t at = 0;
    const int chunks = SUMS / count < 8 ? SUMS / count : 8;
    for (; at + LANES * chunks <= width; at += LANES * chunks)
        LEVEL(add_values)(r, row, count, at, chunks, (int)from, (int)until, bfloat16);
    if (chunks > 4 && at + LANES * 4 <= width) LEVEL(add_values)(r, row, count, at, 4, (int)from, (int)until, bfloat16), at += LANES * 4;
    for (; at < width; at += LANES) LEVEL(add_values)(r, row, count, at, 1, (int)from, (int)until, bfloat16);
}

INLINE void LEVEL(segment_all)(LEVEL(rows) *r, int64_t count, int64_t segment, int bfloat16) {
    int64_t row = 0;
    for (; row + ROWS_AT_ONCE <= count; row += ROWS_AT_ONCE) LEVEL(segment_rows)(r, row, ROWS_AT_ONCE, segment, bfloat16);
#if ROWS_AT_ONCE > 4
    if (row + 4 <= count) LEVEL(segment_rows)(r, row, 4, segment, bfloat16), row += 4;
#endif
#if ROWS_AT_ONCE > 2
    if (row + 2 <= count) LEVEL(segment_rows)(r, row, 2, segment, bfloat16), row += 2;
#endif
    for (; row < count; row++) LEVEL(segment_rows)(r, row, 1, segment, bfloat16);
}

/* Some queries of one sequence and all heads that share a key head. */
static void LEVEL(attend_task)(void *job, int64_t number) {
    const attention_job *j = job;
    const attention_layer *a = j->layer;
    const attention_step *s = j->step;
    int64_t low = 0, high = s->sequences - 1; /* the last sequence whose tasks begin at or before this one */
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (s->first_task[middle] <= number) low = middle;
        else high = middle - 1;
    }
    const int64_t sequence = low, own = number - s->first_task[sequence], group = a->heads / a->kv_heads, d = a->head_dim;
    const int64_t kv_head = own % a->kv_heads, first = own / a->kv_heads * j->rows, size = a->bfloat16 ? 2 : 4;
    const int64_t all = (s->first_token[sequence + 1] - s->first_token[sequence]) * group;
    const int64_t count = all - first < j->rows ? all - first : j->rows;
    float *answer[MOST_ROWS];
    LEVEL(rows) r;
    r.layer = a;
    memset(r.sums, 0, count * a->value_width * sizeof(float));
    int64_t begin = INT64_MAX, end = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t query = (first + i) / group, head = kv_head * group + (first + i) % group;
        const int64_t position = s->start[sequence] + query;
        answer[i] = j->out + ((s->first_token[sequence] + query) * a->heads + head) * d;
        memcpy(r.q + i * a->value_width, answer[i], d * sizeof(float));
        r.from[i] = first_seen(a, position);
        r.until[i] = position + 1;
        r.most[i] = a->sinks ? a->sinks[head] : -INFINITY;
        r.total[i] = a->sinks ? 1 : 0;
        begin = r.from[i] < begin ? r.from[i] : begin;
        end = r.until[i] > end ? r.until[i] : end;
    }
    for (int64_t segment = begin / SEGMENT * SEGMENT; segment < end; segment += SEGMENT) {
        for (int b = 0; b < 2 * BLOCKS; b++) {
            const int64_t at = segment + BLOCK * b, known = at < end ? at : (end - 1) / BLOCK * BLOCK;
            const int64_t page = page_of(s, a, sequence, known) * a->kv_heads + kv_head, place = known % a->page_tokens;
            r.keys[b / BLOCKS][b % BLOCKS] = a->keys + (page * d * a->page_tokens + place) * size;
            r.values[b / BLOCKS][b % BLOCKS] = a->values + (page * a->page_tokens + place) * a->value_width * size;
        }
        if (a->bfloat16) LEVEL(segment_all)(&r, count, segment, 1);
        else LEVEL(segment_all)(&r, count, segment, 0);
    }
    for (int64_t i = 0; i < count; i++) LEVEL(scaled)(answer[i], r.sums + i * a->value_width, 1 / r.total[i], NULL, d);
}

/* A row of x, with one of y added first where there is one, over its size and times the weights. */
static void LEVEL(norm_row)(void *job, int64_t row) {
    const norm_job *j = job;
    float *x = j->x + row * j->width;
    if (j->add) {
        const float *add = j->add + row * j->width;
        for (int64_t i = 0; i < j->width; i++) x[i] += add[i];
    }
    LEVEL(scaled)(j->out + row * j->width, x, LEVEL(inverse_size)(x, j->width, j->eps), j->weight, j->width);
}

static const attention_tasks LEVEL(attention) = {LEVEL(prepare_token), LEVEL(attend_task), LEVEL(norm_row)};
#undef PARTS
#undef ROWS_AT_ONCE
#undef SUMS
