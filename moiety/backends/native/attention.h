/* Attention over paged keys and values: what attention.c and its Python binding agree on. Plain C, no state. */
#ifndef MOIETY_ATTENTION_H
#define MOIETY_ATTENTION_H

#include "kernels.h"

#define BLOCK 16                 /* keys that lie side by side for each dimension */
#define BLOCKS 4                 /* of a segment */
#define SEGMENT (BLOCK * BLOCKS) /* keys between two corrections of the running softmax, from position 0 on */
#define MOST_ROWS 64             /* queries of a task: they share each segment while it is in cache */
#define TASK_FLOATS 8192         /* of a task's sums, on the stack */
#define MOST_HEAD_DIM 512

/* The numbers are known to cpu_attention.py. */
enum norm { NORM_NONE, NORM_HEAD, NORM_FULL, NORM_HEAD_ROTATED, NORM_UNIT_ROTATED };

/* One layer: its options and its memory. A page holds page_tokens tokens, a multiple of 16. */
typedef struct {
    const float *q_norm, *k_norm; /* weights, or NULL */
    const float *sinks;           /* (heads), or NULL */
    char *keys;                   /* (pages, kv_heads, head_dim, page_tokens) */
    char *values;                 /* (pages, kv_heads, page_tokens, value_width) */
    int64_t heads, kv_heads, head_dim, value_width; /* value_width: head_dim, up to a multiple of 16 */
    int64_t page_tokens, pairs;                     /* pairs: turned dimensions / 2 */
    int64_t window;                                 /* tokens; 0 is all */
    int32_t chunked, interleaved, norm, bfloat16;   /* bfloat16: else float32 */
    int32_t factored;                               /* queries are multiplied by the step's factors */
    float norm_eps, clip, scale, cap;               /* clip, cap: 0 is off */
} attention_layer;

/* One forward pass: new tokens of several sequences, one after the other. */
typedef struct {
    int64_t sequences, tokens;
    const int64_t *pages;       /* all tables, one after the other */
    const int64_t *first_page;  /* (sequences) where each table begins */
    const int64_t *first_token; /* (sequences + 1) */
    const int64_t *start;       /* (sequences) tokens that are in the pages already */
    const int64_t *sequence;    /* (tokens) whose token it is */
    const float *cos, *sin;     /* (tokens, pairs) */
    const float *query_factor;  /* (tokens); NULL where no layer is factored */
    int64_t *first_task;        /* (sequences + 1), written */
} attention_step;

typedef struct {
    const attention_layer *layer;
    const attention_step *step;
    const float *qkv; /* (tokens, (heads + 2 kv_heads) * head_dim) */
    float *out;       /* (tokens, heads * head_dim): the prepared queries, then the answers */
    int64_t pieces;   /* tasks that prepare one token */
    int64_t rows;     /* queries of an attention task */
} attention_job;

void moiety_attention(const attention_layer *a, const attention_step *s, const float *qkv, float *out, const crew *who);

static inline int64_t page_of(const attention_step *s, const attention_layer *a, int64_t sequence, int64_t position) {
    return s->pages[s->first_page[sequence] + position / a->page_tokens];
}

/* The first key that a query at a position sees. */
static inline int64_t first_seen(const attention_layer *a, int64_t position) {
    if (a->window == 0) return 0;
    if (a->chunked) return position / a->window * a->window;
    return position >= a->window ? position - a->window + 1 : 0;
}

#endif
