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

/* y (T, D) = what follows x in the residual stream. Returns 0, or 1 without memory. */
EXPORT int32_t moiety_block(const block *b, const attention_step *s, const float *x, float *y, const routing *to, const crew *who) {
    const int64_t tokens = s->tokens, width = b->width, projected = b->qkv->rows, attended = b->out->columns;
    float *normed = malloc(tokens * (2 * width + projected + attended) * sizeof *normed);
    if (!normed) return 1;
    float *added = normed + tokens * width, *qkv = added + tokens * width, *answer = qkv + tokens * projected;
    memcpy(y, x, tokens * width * sizeof *y);
    moiety_rms_norm(y, NULL, b->attention_norm, b->norm_eps, normed, tokens, width, who);
    int32_t failed = moiety_grouped_linear(b->qkv, normed, tokens, width, NULL, qkv, who);
    if (!failed) {
        moiety_attention(b->attention, s, qkv, answer, who);
        failed = moiety_grouped_linear(b->out, answer, tokens, attended, NULL, added, who);
    }
    if (!failed) {
        moiety_rms_norm(y, added, b->feed_forward_norm, b->norm_eps, normed, tokens, width, who);
        moiety_route(b->router, normed, tokens, width, to, who);
        failed = moiety_experts(b->up, b->down, b->activation, b->gated, b->limit, normed, tokens, width, to->token_of,
                                to->weight_of, to->counts, tokens * b->router->k, added, who);
    }
    if (!failed)
        for (int64_t i = 0; i < tokens * width; i++) y[i] += added[i];
    free(normed);
    return failed;
}
