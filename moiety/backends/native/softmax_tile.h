/* Rows through a softmax at one level: included by softmax.c through levels.h. */

#include "lanes.h"

/* LANES scores of a row from column `at` on, and how they change with the logits times the multiplier; those past the last are
 * -inf. */
INLINE vf LEVEL(scores)(const loss_job *j, const char *row, int64_t at, vf *slope) {
    const int64_t size = j->bfloat16 ? 2 : 4, left = j->vocabulary - at;
    char last[LANES * 4] = {0};
    if (left < LANES) memcpy(last, row + at * size, left * size);
    vf x = j->multiplier * LEVEL(stored)(j->bfloat16, left < LANES ? last : row + at * size);
    if (j->cap > 0) {
        const vf part = LEVEL(tangent)(x / j->cap);
        x = j->cap * part, *slope = 1.0f - part * part;
    }
    return left < LANES ? LEVEL(first)(x, left, -INFINITY) : x;
}

/* Write numbers over stored ones, rounded to the nearest; `left` of them exist. */
INLINE void LEVEL(store)(int bfloat16, char *to, vf x, int64_t left) {
    const int64_t count = left < LANES ? left : LANES;
    if (!bfloat16) {
        memcpy(to, &x, count * sizeof(float));
        return;
    }
    const vu bits = (vu)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
    const vu kept = (vu)LEVEL(choose)(x != x, (vf)(bits | 0x400000), (vf)rounded);
    const vh half = __builtin_convertvector(kept >> 16, vh);
    memcpy(to, &half, count * sizeof half[0]);
}

/* exp(x), and nothing where that is less than a float32 can hold. */
INLINE vf LEVEL(weight)(vf x) { return LEVEL(choose)(x < -87.0f, (vf){}, LEVEL(exponential)(x)); }

static void LEVEL(loss_row)(void *data, int64_t number) {
    const loss_job *j = data;
    const int64_t size = j->bfloat16 ? 2 : 4, target = j->target[number];
    char *row = j->logits + number * j->stride * size;
    const float scale = j->scale ? j->scale[number] : 1;
    vf highest = (vf){} - INFINITY, slope = (vf){} + 1.0f;
    for (int64_t at = 0; at < j->vocabulary; at += LANES) {
        const vf x = LEVEL(scores)(j, row, at, &slope);
        highest = LEVEL(choose)((x > highest) | (x != x), x, highest);
    }
    const float most = LEVEL(largest)(highest);
    double sum = 0;
    for (int64_t at = 0; at < j->vocabulary;) {
        vf part = {};
        for (int n = 0; n < 64 && at < j->vocabulary; n++, at += LANES) part += LEVEL(weight)(LEVEL(scores)(j, row, at, &slope) - most);
        sum += LEVEL(sum)(part);
    }
    const float of_target = LEVEL(scores)(j, row, target / LANES * LANES, &slope)[target % LANES];
    j->nats[number] = scale * (log(sum) + ((double)most - of_target));
    if (!j->gradient) return;
    const float share = (float)(1 / sum), factor = scale * j->multiplier;
    for (int64_t at = 0; at < j->vocabulary; at += LANES) {
        const vf x = LEVEL(scores)(j, row, at, &slope);
        vf p = LEVEL(weight)(x - most) * share;
        if (target - at < LANES && target >= at) p[target - at] -= 1;
        LEVEL(store)(j->bfloat16, row + at * size, p * slope * factor, j->vocabulary - at);
    }
}
/* LANES scores of a causal row, those that are not seen -inf. */
INLINE vf LEVEL(seen)(const float *row, int64_t at, int64_t limit, float scale) {
    return LEVEL(first)(scale * LEVEL(load)(row + at), limit - at, -INFINITY);
}

static void LEVEL(share_row)(const causal_job *j, int64_t number) {
    const int64_t limit = j->first + number % j->positions + 1, size = j->bfloat16 ? 2 : 4;
    float *row = j->score + number * j->stride;
    char *share = j->share + number * j->stride * size;
    vf highest = (vf){} - INFINITY, sums = {};
    for (int64_t at = 0; at < limit; at += LANES) {
        const vf x = LEVEL(seen)(row, at, limit, j->scale);
        highest = LEVEL(choose)((x > highest) | (x != x), x, highest);
    }
    const float most = LEVEL(largest)(highest);
    for (int64_t at = 0; at < limit; at += LANES) {
        const vf p = LEVEL(weight)(LEVEL(seen)(row, at, limit, j->scale) - most);
        sums += p;
        memcpy(row + at, &p, sizeof p);
    }
    const float sum = LEVEL(sum)(sums), part = 1 / sum;
    j->log_sum[number] = most + logf(sum);
    for (int64_t at = 0; at < j->stride; at += LANES) {
        const vf p = at < limit ? part * LEVEL(load)(row + at) : (vf){};
        LEVEL(store)(j->bfloat16, share + at * size, p, LANES);
    }
}

static void LEVEL(share_row_back)(const causal_job *j, int64_t number) {
    const int64_t limit = j->first + number % j->positions + 1, size = j->bfloat16 ? 2 : 4;
    float *row = j->score + number * j->stride;
    char *share = j->share + number * j->stride * size, *grad = j->grad + number * j->stride * size;
    const float log_sum = j->log_sum[number];
    vf dots = {};
    for (int64_t at = 0; at < j->stride; at += LANES) {
        vf p = {};
        if (at < limit) {
            p = LEVEL(weight)(LEVEL(seen)(row, at, limit, j->scale) - log_sum);
            dots += p * LEVEL(first)(LEVEL(stored)(j->bfloat16, grad + at * size), limit - at, 0);
            memcpy(row + at, &p, sizeof p);
        }
        LEVEL(store)(j->bfloat16, share + at * size, p, LANES);
    }
    const float dot = LEVEL(sum)(dots);
    for (int64_t at = 0; at < j->stride; at += LANES) {
        vf change = {};
        if (at < limit) {
            const vf g = LEVEL(first)(LEVEL(stored)(j->bfloat16, grad + at * size), limit - at, 0);
            change = j->scale * LEVEL(load)(row + at) * (g - dot);
        }
        LEVEL(store)(j->bfloat16, grad + at * size, change, LANES);
    }
}

static void LEVEL(shares)(void *data, int64_t number) {
    const causal_job *j = data;
    for (int64_t row = number * TASK_ROWS; row < (number + 1) * TASK_ROWS && row < j->rows; row++) LEVEL(share_row)(j, row);
}

static void LEVEL(shares_back)(void *data, int64_t number) {
    const causal_job *j = data;
    for (int64_t row = number * TASK_ROWS; row < (number + 1) * TASK_ROWS && row < j->rows; row++) LEVEL(share_row_back)(j, row);
}

static const softmax_tasks LEVEL(softmax) = {LEVEL(loss_row), LEVEL(shares), LEVEL(shares_back)};
