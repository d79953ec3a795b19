/* Attention over paged keys and values, and norms of rows: one file compiled for every level. See attention.h. */
#include "vectors.h"

#include "attention.h"

typedef struct {
    float *x;          /* (rows, width) */
    const float *add;  /* the same shape, or NULL */
    const float *weight;
    float *out;
    int64_t width;
    float eps;
} norm_job;

typedef struct {
    task prepare, attend, norm;
} attention_tasks;

#define TILE "attention_tile.h"
#include "levels.h"

static const attention_tasks *tasks_of(int32_t level) {
#if defined(__x86_64__)
    if (level == LEVEL_AVX2) return &avx2_attention;
    if (level > LEVEL_AVX2) return &avx512_attention;
#endif
    return &portable_attention;
}

/* New keys and values into their pages, then every new token's answer. */
EXPORT void moiety_attention(const attention_layer *a, const attention_step *s, const float *qkv, float *out, const crew *who) {
    const attention_tasks *tasks = tasks_of(who->level);
    attention_job j = {.layer = a, .step = s, .qkv = qkv, .out = out};
    j.pieces = s->tokens < 2 * who->threads && a->kv_heads >= who->threads ? who->threads : 1;
    j.rows = TASK_FLOATS / a->value_width / 8 * 8;
    j.rows = j.rows > MOST_ROWS ? MOST_ROWS : j.rows;
    s->first_task[0] = 0;
    for (int64_t b = 0; b < s->sequences; b++) {
        const int64_t rows = (s->first_token[b + 1] - s->first_token[b]) * (a->heads / a->kv_heads);
        s->first_task[b + 1] = s->first_task[b] + (rows + j.rows - 1) / j.rows * a->kv_heads;
    }
    const phase phases[] = {{tasks->prepare, s->tokens * j.pieces}, {tasks->attend, s->first_task[s->sequences]}};
    run_phases(who, &j, phases, 2);
}

/* out = norm(x), after x += add. */
EXPORT void moiety_rms_norm(float *x, const float *add, const float *weight, float eps, float *out, int64_t rows, int64_t width,
                            const crew *who) {
    norm_job j = {x, add, weight, out, width, eps};
    const phase phases[] = {{tasks_of(who->level)->norm, rows}};
    const crew alone = {NULL, 1, who->level};
    run_phases(rows * width < 1 << 16 ? &alone : who, &j, phases, 1);
}
