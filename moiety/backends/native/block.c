/* A whole block for a few tokens, where calls cost as much as products: norm, attention, norm, router, experts. It is the
 * operations of the other files one after the other, so its numbers are theirs. */
#include <stdlib.h>
#include <string.h>

#include "attention.h"

typedef struct {
    const float *attention_norm, *feed_forward_norm; /* (D) */
    const matrix *qkv, *out, *up, *down;
    const attention_layer *attention;
    const router *router;
    int64_t width;
    int32_t activation, gated;
    float limit, norm_eps;
} block;

/* What a block holds beside its rows, in one piece of memory. */
typedef struct {
    float *normed, *added, *qkv, *answer; /* (T, D), (T, D), (T, rows of qkv), (T, columns of out) */
} room;

static int claim(room *r, const block *b, int64_t tokens) {
    r->normed = malloc(tokens * (2 * b->width + b->qkv->rows + b->out->columns) * sizeof *r->normed);
    if (!r->normed) return 0;
    r->added = r->normed + tokens * b->width, r->qkv = r->added + tokens * b->width, r->answer = r->qkv + tokens * b->qkv->rows;
    return 1;
}

/* Up to where experts are needed: y = x + attention(norm(x)), the rows that experts get, and who gets them. */
static int32_t decide(const block *b, const attention_step *s, const float *x, float *y, float *normed, const room *r,
                      const routing *to, const crew *who) {
    const int64_t tokens = s->tokens, width = b->width;
    memcpy(y, x, tokens * width * sizeof *y);
    moiety_rms_norm(y, NULL, b->attention_norm, b->norm_eps, normed, tokens, width, who);
    int32_t failed = moiety_grouped_linear(b->qkv, normed, tokens, width, NULL, r->qkv, who);
    if (!failed) {
        moiety_attention(b->attention, s, r->qkv, r->answer, who);
        failed = moiety_grouped_linear(b->out, r->answer, tokens, b->out->columns, NULL, r->added, who);
    }
    if (!failed) {
        moiety_rms_norm(y, r->added, b->feed_forward_norm, b->norm_eps, normed, tokens, width, who);
        moiety_route(b->router, normed, tokens, width, to, who);
    }
    return failed;
}

/* y (T, D) = what follows x in the residual stream. Returns 0, or 1 without memory. */
EXPORT int32_t moiety_block(const block *b, const attention_step *s, const float *x, float *y, const routing *to, const crew *who) {
    const int64_t tokens = s->tokens, width = b->width;
    room r;
    if (!claim(&r, b, tokens)) return 1;
    int32_t failed = decide(b, s, x, y, r.normed, &r, to, who);
    if (!failed)
        failed = moiety_experts(b->up, b->down, b->activation, b->gated, b->limit, r.normed, tokens, width, to->token_of,
                                to->weight_of, to->counts, tokens * b->router->k, r.added, who);
    if (!failed)
        for (int64_t i = 0; i < tokens * width; i++) y[i] += r.added[i];
    free(r.normed);
    return failed;
}

/* All but the experts: y, `normed` (T, D) for them, and who gets which row. With `next`, also whom another router would give
 * these rows, times `ratio` (D) where there is one. Returns as above. */
EXPORT int32_t moiety_block_front(const block *b, const attention_step *s, const float *x, float *y, float *normed,
                                  const routing *to, const router *next, const float *ratio, const routing *then,
                                  const crew *who) {
    const int64_t tokens = s->tokens, width = b->width;
    room r;
    if (!claim(&r, b, tokens)) return 1;
    const int32_t failed = decide(b, s, x, y, normed, &r, to, who);
    if (!failed && next) {
        for (int64_t i = 0; i < tokens * width; i++) r.normed[i] = ratio ? normed[i] * ratio[i % width] : normed[i];
        moiety_route(next, r.normed, tokens, width, then, who);
    }
    free(r.normed);
    return failed;
}
