/* What goes through a softmax in training, row by row: cross entropy of logits, and the shares of causal attention. One file
 * compiled for every level. */
#include "vectors.h"

typedef struct {
    char *logits;          /* (rows, stride) bfloat16 or float32; then the gradient */
    const int64_t *target; /* (rows), each below `vocabulary` */
    const float *scale;    /* (rows) factor on a row's loss, or NULL */
    double *nats;          /* (rows), written */
    int64_t vocabulary, stride;
    int32_t bfloat16, gradient; /* gradient: 0 leaves the logits as they are */
    float multiplier, cap;      /* score = cap * tanh(multiplier * logit / cap); cap 0 is none */
} loss_job;

/* Scores of queries and keys: row r is of position first + r % positions and sees the keys up to that one. Rows have room for
 * `stride` keys, a multiple of 16, the least that holds all that any of them sees. */
typedef struct {
    float *score;       /* (rows, stride), lost */
    char *share;        /* (rows, stride) bfloat16 or float32, written: softmax(scale * score), 0 where nothing is seen */
    char *grad;         /* backward alone, the same type: gradient of the shares, then of the scores */
    float *log_sum;     /* (rows) ln sum exp(scale * score): written forward, read backward */
    int64_t rows, stride, first, positions;
    int32_t bfloat16;
    float scale; /* above 0 */
} causal_job;

#define TASK_ROWS 8 /* of scores */

typedef struct {
    task loss, share, share_back;
} softmax_tasks;

#define TILE "softmax_tile.h"
#include "levels.h"

static const softmax_tasks *tasks_of(int32_t level) {
#if defined(__x86_64__)
    if (level == LEVEL_AVX2) return &avx2_softmax;
    if (level > LEVEL_AVX2) return &avx512_softmax;
#endif
    return &portable_softmax;
}

static void run_tasks(task each, const void *job, int64_t tasks, const crew *who) {
    const phase phases[] = {{each, tasks}};
    run_phases(who, (void *)job, phases, 1);
}

/* The loss of every row and, if wanted, its gradient in the place of the logits. */
EXPORT void moiety_cross_entropy(const loss_job *j, int64_t rows, const crew *who) {
    run_tasks(tasks_of(who->level)->loss, j, rows, who);
}

/* Shares of every row. */
EXPORT void moiety_causal(const causal_job *j, const crew *who) {
    run_tasks(tasks_of(who->level)->share, j, (j->rows + TASK_ROWS - 1) / TASK_ROWS, who);
}

/* Shares of every row again, and the gradient of its scores. */
EXPORT void moiety_causal_back(const causal_job *j, const crew *who) {
    run_tasks(tasks_of(who->level)->share_back, j, (j->rows + TASK_ROWS - 1) / TASK_ROWS, who);
}
