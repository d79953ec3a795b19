/* A router that compares softmax or sigmoid scores and takes the best: logits, scores, choice and weights in one call. */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define TOKENS 4 /* that share a row of the gate's weights */

typedef struct {
    const level_table *table;
    const router *r;
    const float *x;
    int64_t tokens, x_stride;
    float *logits, *scores, *compared; /* (T, E) */
    int64_t *chosen;                   /* (T, K), ascending */
    float *weight;                     /* (T, K) */
} route_job;

static void score_row(const router *r, const float *logits, float *scores) {
    if (r->sigmoid) {
        for (int64_t e = 0; e < r->experts; e++) scores[e] = 1 / (1 + expf(-logits[e]));
        return;
    }
    float highest = -INFINITY, sum = 0;
    for (int64_t e = 0; e < r->experts; e++) highest = logits[e] > highest ? logits[e] : highest;
    for (int64_t e = 0; e < r->experts; e++) sum += scores[e] = expf(logits[e] - highest);
    for (int64_t e = 0; e < r->experts; e++) scores[e] /= sum;
}

/* Mark the `k` best of `count` numbers, of equal ones the first; marks are 0 or 1. Returns their sum, the largest first, so
 * that it does not depend on where they are. */
static float mark_best(const float *numbers, int64_t count, int64_t k, uint8_t *marks) {
    float sum = 0;
    memset(marks, 0, count);
    for (int64_t i = 0; i < k; i++) {
        int64_t best = 0;
        while (marks[best]) best++;
        for (int64_t e = best + 1; e < count; e++)
            if (!marks[e] && numbers[e] > numbers[best]) best = e;
        marks[best] = 1;
        sum += numbers[best];
    }
    return sum;
}

#define MOST_EXPERTS 1024 /* known to cpu_routing.py */

/* Experts outside of the best groups lose. */
static void keep_groups(const router *r, float *compared) {
    const int64_t size = r->experts / r->groups;
    float of_group[MOST_EXPERTS];
    uint8_t marks[MOST_EXPERTS];
    for (int64_t g = 0; g < r->groups; g++) of_group[g] = mark_best(compared + g * size, size, r->group_best, marks);
    mark_best(of_group, r->groups, r->groups_kept, marks);
    for (int64_t e = 0; e < r->experts; e++)
        if (!marks[e / size]) compared[e] = -INFINITY;
}

static void choose_row(const route_job *j, int64_t token) {
    const router *r = j->r;
    const float *scores = j->scores + token * r->experts;
    float compared[MOST_EXPERTS];
    uint8_t marks[MOST_EXPERTS];
    for (int64_t e = 0; e < r->experts; e++) compared[e] = scores[e] + (r->bias ? r->bias[e] : 0);
    if (r->groups_kept < r->groups) keep_groups(r, compared);
    mark_best(compared, r->experts, r->k, marks);
    int64_t *chosen = j->chosen + token * r->k, found = 0;
    float *weight = j->weight + token * r->k, sum = 0;
    for (int64_t e = 0; e < r->experts; e++)
        if (marks[e]) chosen[found] = e, weight[found++] = scores[e];
    for (int64_t i = 0; i < r->k; i++) sum += weight[i];
    const float divisor = !r->renormalize ? 1 : r->sigmoid ? sum + r->tiny : sum > r->tiny ? sum : r->tiny;
    for (int64_t i = 0; i < r->k; i++) weight[i] = weight[i] / divisor * r->scale;
}

static void route_task(void *data, int64_t number) {
    const route_job *j = data;
    const router *r = j->r;
    const int64_t from = number * TOKENS, left = j->tokens - from;
    const int32_t count = left < TOKENS ? (int32_t)left : TOKENS;
    const float *x[TOKENS];
    float dots[TOKENS];
    for (int32_t i = 0; i < count; i++) x[i] = j->x + (from + i) * j->x_stride;
    for (int64_t e = 0; e < r->experts; e++) {
        j->table->dots(x, count, r->gate + e * r->width, r->width, dots);
        for (int32_t i = 0; i < count; i++)
            j->logits[(from + i) * r->experts + e] = dots[i] + (r->gate_bias ? r->gate_bias[e] : 0);
    }
    for (int64_t token = from; token < from + count; token++) {
        score_row(r, j->logits + token * r->experts, j->scores + token * r->experts);
        choose_row(j, token);
    }
}

/* Route T tokens. */
EXPORT void moiety_route(const router *r, const float *x, int64_t tokens, int64_t x_stride, const routing *to, const crew *who) {
    route_job j = {.table = table_of(who->level), .r = r, .x = x, .tokens = tokens, .x_stride = x_stride, .logits = to->logits,
                   .scores = to->scores, .chosen = to->chosen, .weight = to->weight};
    const phase phases[] = {{route_task, (tokens + TOKENS - 1) / TOKENS}};
    run_phases(who, &j, phases, 1);
    int64_t next[MOST_EXPERTS] = {0};
    memset(to->counts, 0, r->experts * sizeof *to->counts);
    for (int64_t i = 0; i < tokens * r->k; i++) to->counts[to->chosen[i]]++;
    for (int64_t e = 1; e < r->experts; e++) next[e] = next[e - 1] + to->counts[e - 1];
    for (int64_t i = 0; i < tokens * r->k; i++) {
        const int64_t at = next[to->chosen[i]]++;
        to->token_of[at] = i / r->k, to->weight_of[at] = to->weight[i];
    }
}
