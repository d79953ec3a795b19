/* Who does what: threads, phases, and the two whole operations, a grouped linear and a layer's experts. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

#define TILE_STATE (3u << 17) /* of AMX, in the processor's list of what the system keeps for a process */
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#define TASK_BYTES (192 << 10) /* of weights: large enough to hide the queue, small enough to share evenly */
#define PANEL 128              /* rows whose operands stay in the second cache while a task's weights pass */
#define ALIGN 64
#define KEPT_BYTES (32 << 20) /* what is larger goes back to the system when it is freed */

enum failure { DONE, NO_MEMORY, NOT_THERE }; /* of the exported operations; the numbers are known to cpu.py */

const level_table *table_of(int32_t level) {
#if defined(__x86_64__)
    if (level == LEVEL_AVX2) return &avx2_table;
    if (level == LEVEL_AVX512) return &avx512_table;
    if (level == LEVEL_AMX) return &amx_table;
#endif
    return &portable_table;
}

#if defined(__x86_64__)
static int has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

/* Why the AMX level cannot be used; NULL where it can. Linux gives a process its tiles when asked, for all of its threads. */
EXPORT const char *moiety_no_amx(void) {
#if !defined(__x86_64__)
    return "the processor has none";
#else
    if (!has_avx512()) return "the processor has no AVX-512 with VNNI beside it";
#if defined(MOIETY_EMULATE_AMX)
    return NULL;
#else
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return "the processor has none";
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return "the system does not keep its registers";
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & TILE_STATE) != TILE_STATE) return "the system does not keep its registers";
#if defined(__linux__)
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return "the system refused this process its registers";
    return NULL;
#else
    return "how to ask this system for its registers is not known";
#endif
#endif
#endif
}

EXPORT int32_t moiety_best_level(void) {
#if defined(__x86_64__)
    if (has_avx512()) return moiety_no_amx() ? LEVEL_AVX512 : LEVEL_AMX;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return LEVEL_AVX2;
#endif
    return LEVEL_PORTABLE;
}

/* Threads */

typedef struct {
    void *job;
    const phase *phases;
    int64_t count;
    atomic_llong *next, *done; /* of each phase */
} shift;

static void work(void *data) {
    const shift *s = data;
    for (int64_t p = 0; p < s->count; p++) {
        const int64_t tasks = s->phases[p].tasks;
        int64_t number, finished = 0;
        while ((number = atomic_fetch_add_explicit(&s->next[p], 1, memory_order_relaxed)) < tasks) {
            s->phases[p].run(s->job, number);
            finished++;
        }
        if (finished) atomic_fetch_add_explicit(&s->done[p], finished, memory_order_acq_rel);
        for (int64_t turn = 0; atomic_load_explicit(&s->done[p], memory_order_acquire) < tasks; turn++)
            if (turn > 2000) sched_yield(); /* more threads than cores: let the others finish */
    }
}

static void *work_thread(void *data) {
    work(data);
    return NULL;
}

#define MOST_PHASES 8
#define MOST_THREADS 256

void run_phases(const crew *who, void *job, const phase *phases, int64_t count) {
    atomic_llong next[MOST_PHASES], done[MOST_PHASES];
    int64_t widest = 0;
    for (int64_t p = 0; p < count; p++) {
        atomic_init(&next[p], 0);
        atomic_init(&done[p], 0);
        widest = phases[p].tasks > widest ? phases[p].tasks : widest;
    }
    shift s = {job, phases, count, next, done};
    int32_t threads = who->threads < MOST_THREADS ? who->threads : MOST_THREADS;
    if (widest < threads) threads = (int32_t)widest;
    if (threads <= 1) {
        work(&s);
    } else if (who->parallel) {
        who->parallel(work, &s, (unsigned)threads, 0);
    } else {
        pthread_t made[MOST_THREADS];
        int32_t running = 0;
        while (running < threads - 1 && pthread_create(&made[running], NULL, work_thread, &s) == 0) running++;
        work(&s);
        for (int32_t i = 0; i < running; i++) pthread_join(made[i], NULL);
    }
}

/* Scratch memory, laid out by one cursor, first with a NULL base to count and then for use. The last piece is kept for the
 * next operation: pieces that come and go leave holes among what is in use, and a process grows by them. */

typedef struct {
    char *base;
    int64_t used;
} cursor;

static void *take(cursor *at, int64_t bytes) {
    void *found = at->base ? at->base + at->used : NULL;
    at->used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return found;
}

static operand take_operand(cursor *at, const matrix *w, int64_t rows) {
    operand x = {.width = w->groups * w->group, .groups = w->groups};
    if (is_integer(w->kind)) {
        x.code = take(at, rows * x.width);
        x.group = take(at, rows * x.groups * sizeof(code_group));
    } else {
        x.value = take(at, rows * x.width * 4);
    }
    return x;
}

static void prepare_one(const level_table *table, const matrix *w, const float *from, const operand *x, int64_t row) {
    if (x->value)
        table->prepare(w, from, NULL, (float *)x->value + row * x->width, NULL);
    else
        table->prepare(w, from, (int8_t *)x->code + row * x->width, NULL, (code_group *)x->group + row * x->groups);
}

/* From a stack's first byte to an expert's; negative where it is not in memory. */
static int64_t place_of(const matrix *w, int64_t expert) {
    return w->place ? w->place[expert] : expert * w->expert_bytes;
}

/* One product: the rows of each expert with its matrix. Tasks go over (expert with rows, run of row blocks). */

typedef struct {
    const level_table *table;
    const matrix *w;
    operand x;
    const int64_t *row_of;  /* (N) operand row of each pair; the pairs of an expert follow each other */
    const int64_t *first;   /* (experts + 1) */
    const int64_t *busy;    /* experts with rows */
    int64_t busy_count, run, runs; /* row blocks of a task, tasks of an expert */
    int32_t activation, gated;
    float limit;
    float *y;               /* (N, y_width), or the hidden rows after an activation */
    int64_t y_width, y_columns; /* width of a row, and how many numbers of it are written */
} product;

/* How many row blocks, an even number, are a task. */
static void plan_runs(product *p, int32_t threads) {
    const int64_t blocks = p->w->row_blocks, wanted = 4 * (int64_t)threads;
    int64_t run = TASK_BYTES / (p->w->groups * p->w->tile_bytes);
    if (run > blocks * p->busy_count / wanted) run = blocks * p->busy_count / wanted;
    p->run = run < 2 ? 2 : run / 2 * 2;
    p->runs = (blocks + p->run - 1) / p->run;
}

static void store(const product *p, int64_t pair, int64_t block, const float *from) {
    const int64_t left = p->y_columns - block * ROWS;
    memcpy(p->y + pair * p->y_width + block * ROWS, from, (left < ROWS ? left : ROWS) * sizeof(float));
}

static void add_bias(const product *p, int64_t expert, int64_t block, int64_t count, float (*out)[ROWS]) {
    if (!p->w->bias) return;
    const float *bias = p->w->bias + (expert * p->w->row_blocks + block) * ROWS;
    for (int64_t i = 0; i < count; i++)
        for (int n = 0; n < ROWS; n++) out[i][n] += bias[n];
}

/* Two row blocks at a time: a gate's and its up projection's, or neighbours. */
static void product_task(const product *p, int64_t number) {
    const int64_t expert = p->busy[number / p->runs], from = number % p->runs * p->run;
    const int64_t to = from + p->run < p->w->row_blocks ? from + p->run : p->w->row_blocks;
    const int64_t block_bytes = p->w->groups * p->w->tile_bytes;
    const uint8_t *tiles = p->w->tiles + place_of(p->w, expert);
    float one[PANEL][ROWS] __attribute__((aligned(ALIGN))), two[PANEL][ROWS] __attribute__((aligned(ALIGN)));
    float(*const out[2])[ROWS] = {one, two};
    for (int64_t start = p->first[expert]; start < p->first[expert + 1]; start += PANEL) {
        const int64_t left = p->first[expert + 1] - start, count = left < PANEL ? left : PANEL;
        for (int64_t block = from; block < to; block += 2) {
            const int32_t blocks = to - block < 2 ? 1 : 2;
            p->table->product(p->w, tiles + block * block_bytes, blocks, &p->x, p->row_of + start, count, out);
            for (int32_t b = 0; b < blocks; b++) add_bias(p, expert, block + b, count, out[b]);
            for (int64_t i = 0; i < count; i++) {
                if (p->gated) {
                    p->table->activate(p->activation, p->limit, one[i], two[i], one[i]);
                    store(p, start + i, block / 2, one[i]);
                    continue;
                }
                for (int32_t b = 0; b < blocks; b++) {
                    if (p->activation != ACT_NONE) p->table->activate(p->activation, p->limit, out[b][i], NULL, out[b][i]);
                    store(p, start + i, block + b, out[b][i]);
                }
            }
        }
    }
}

/* Experts of one layer, and a grouped linear as the first half of it */

typedef struct {
    const level_table *table;
    const matrix *up, *down;
    const float *x;         /* (T, x_stride) */
    int64_t tokens, x_stride, pairs;
    const int64_t *token_of; /* (N) */
    const float *weight_of;  /* (N) */
    float *y;                /* (T, columns of y) */
    product first, second;
    operand hidden_operand;
    float *hidden, *answers; /* (N, F), (N, D) */
    int64_t *row_of, *bounds, *busy;
    int64_t *mine, *used, mine_count, used_count; /* pairs that are worked on, and the tokens that they are of */
    uint8_t *seen;                                /* (T) */
    int64_t *pair_of, *first_pair; /* pairs of a token in ascending expert order: (N), (T + 1) */
} job;

static void prepare_task(void *data, int64_t number) {
    const job *j = data;
    const int64_t token = j->used ? j->used[number] : number;
    prepare_one(j->table, j->up, j->x + token * j->x_stride, &j->first.x, token);
}

static void up_task(void *data, int64_t number) { product_task(&((const job *)data)->first, number); }

static void hidden_task(void *data, int64_t number) {
    const job *j = data;
    const int64_t pair = j->mine[number];
    prepare_one(j->table, j->down, j->hidden + pair * j->first.y_width, &j->hidden_operand, pair);
}

static void down_task(void *data, int64_t number) { product_task(&((const job *)data)->second, number); }

static void sum_task(void *data, int64_t token) {
    const job *j = data;
    const int64_t width = j->second.y_width;
    float *y = j->y + token * width;
    memset(y, 0, width * sizeof(float));
    for (int64_t i = j->first_pair[token]; i < j->first_pair[token + 1]; i++) {
        const int64_t pair = j->pair_of[i];
        const float weight = j->weight_of[pair], *from = j->answers + pair * width;
        for (int64_t d = 0; d < width; d++) y[d] += weight * from[d];
    }
}

/* first[e] .. first[e + 1] are the pairs of expert e; those with pairs that the mask names are listed. Returns how many
 * these are, or -1 where one of them is not in memory. */
static int64_t bounds(const matrix *w, const int64_t *counts, const uint8_t *mask, int64_t *first, int64_t *busy) {
    int64_t found = 0;
    first[0] = 0;
    for (int64_t e = 0; e < w->experts; e++) {
        first[e + 1] = first[e] + counts[e];
        if (!counts[e] || (mask && !mask[e])) continue;
        if (place_of(w, e) < 0) return -1;
        busy[found++] = e;
    }
    return found;
}

static void *_Atomic kept; /* its first bytes say how many follow the first ALIGN */

/* After counting: the memory itself. 0 where there is none. */
static int claim(cursor *at) {
    int64_t *found = atomic_exchange(&kept, NULL);
    if (found && *found < at->used) free(found), found = NULL;
    if (!found && (found = aligned_alloc(ALIGN, at->used + ALIGN))) *found = at->used;
    at->base = found ? (char *)found + ALIGN : NULL;
    at->used = 0;
    return found != NULL;
}

static void release(const cursor *at) {
    int64_t *mine = (int64_t *)(at->base - ALIGN);
    free(*mine > KEPT_BYTES ? mine : atomic_exchange(&kept, mine));
}

/* What the answers of pairs take beside `answers`. Rows of pairs that are not worked on are never touched. */
static void take_rows(job *j, cursor *at, int32_t activation, int32_t gated, float limit) {
    const int64_t d_ff = j->down->columns, experts = j->up->experts;
    j->hidden = take(at, j->pairs * d_ff * 4);
    j->hidden_operand = take_operand(at, j->down, j->pairs);
    j->row_of = take(at, j->pairs * 8), j->bounds = take(at, (experts + 1) * 8), j->busy = take(at, experts * 8);
    j->mine = take(at, j->pairs * 8), j->used = take(at, j->tokens * 8), j->seen = take(at, j->tokens);
    j->first = (product){.table = j->table, .w = j->up, .x = take_operand(at, j->up, j->tokens), .row_of = j->token_of,
                         .first = j->bounds, .busy = j->busy, .activation = activation, .gated = gated, .limit = limit,
                         .y = j->hidden, .y_width = d_ff, .y_columns = d_ff};
    j->second = (product){.table = j->table, .w = j->down, .x = j->hidden_operand, .row_of = j->row_of, .first = j->bounds,
                          .busy = j->busy, .y = j->answers, .y_width = j->down->rows, .y_columns = j->down->rows};
}

/* Which pairs are worked on. Returns DONE, or NOT_THERE where an expert of theirs is not in memory. */
static int32_t plan_rows(job *j, const int64_t *counts, const uint8_t *mask, int32_t threads) {
    const int64_t count = bounds(j->up, counts, mask, j->bounds, j->busy);
    if (count < 0 || bounds(j->down, counts, mask, j->bounds, j->busy) < 0) return NOT_THERE;
    memset(j->seen, 0, j->tokens);
    for (int64_t b = 0; b < count; b++)
        for (int64_t pair = j->bounds[j->busy[b]]; pair < j->bounds[j->busy[b] + 1]; pair++) {
            const int64_t token = j->token_of[pair];
            j->row_of[pair] = j->mine[j->mine_count++] = pair;
            if (!j->seen[token]) j->used[j->used_count++] = token;
            j->seen[token] = 1;
        }
    j->first.busy_count = j->second.busy_count = count;
    plan_runs(&j->first, threads);
    plan_runs(&j->second, threads);
    return DONE;
}

/* What the weighted sum takes. */
static void take_sum(job *j, cursor *at) { j->pair_of = take(at, j->pairs * 8), j->first_pair = take(at, (j->tokens + 1) * 8); }

/* Pairs by token; experts ascend because pairs are sorted by expert. */
static void plan_sum(const job *j) {
    int64_t *first = j->first_pair;
    memset(first, 0, (j->tokens + 1) * sizeof *first);
    for (int64_t i = 0; i < j->pairs; i++) first[j->token_of[i] + 1]++;
    for (int64_t t = 0; t < j->tokens; t++) first[t + 1] += first[t];
    for (int64_t i = 0; i < j->pairs; i++) j->pair_of[first[j->token_of[i]]++] = i;
    memmove(first + 1, first, j->tokens * sizeof *first);
    first[0] = 0;
}

#define ROW_PHASES(j) {prepare_task, (j).used_count}, {up_task, (j).first.busy_count * (j).first.runs}, \
                      {hidden_task, (j).mine_count}, {down_task, (j).second.busy_count * (j).second.runs}

/* y[i] = W_e x[i] + b_e for rows sorted by expert; NULL counts mean one expert. Returns a failure. */
EXPORT int32_t moiety_grouped_linear(const matrix *w, const float *x, int64_t rows, int64_t x_stride, const int64_t *counts,
                                     float *y, const crew *who) {
    job j = {.table = table_of(who->level), .up = w, .x = x, .tokens = rows, .x_stride = x_stride, .pairs = rows};
    cursor at = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        if (pass && !claim(&at)) return NO_MEMORY;
        j.row_of = take(&at, rows * 8), j.bounds = take(&at, (w->experts + 1) * 8), j.busy = take(&at, w->experts * 8);
        j.first = (product){.table = j.table, .w = w, .x = take_operand(&at, w, rows), .row_of = j.row_of, .first = j.bounds,
                            .busy = j.busy, .y = y, .y_width = w->rows, .y_columns = w->rows};
    }
    for (int64_t i = 0; i < rows; i++) j.row_of[i] = i;
    j.first.busy_count = bounds(w, counts ? counts : &rows, NULL, j.bounds, j.busy);
    if (j.first.busy_count >= 0) {
        plan_runs(&j.first, who->threads);
        const phase phases[] = {{prepare_task, rows}, {up_task, j.first.busy_count * j.first.runs}};
        run_phases(who, &j, phases, 2);
    }
    release(&at);
    return j.first.busy_count < 0 ? NOT_THERE : DONE;
}

/* answers[pair] = down_e(activation(up_e x[its token])) for the pairs of the experts that the mask (E) names, or of all
 * with NULL; the other rows of `answers` stay as they are. Returns a failure. */
EXPORT int32_t moiety_expert_rows(const matrix *up, const matrix *down, int32_t activation, int32_t gated, float limit,
                                  const float *x, int64_t tokens, int64_t x_stride, const int64_t *token_of,
                                  const int64_t *counts, int64_t pairs, const uint8_t *mask, float *answers, const crew *who) {
    job j = {.table = table_of(who->level), .up = up, .down = down, .x = x, .tokens = tokens, .x_stride = x_stride,
             .pairs = pairs, .token_of = token_of, .answers = answers};
    cursor at = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        if (pass && !claim(&at)) return NO_MEMORY;
        take_rows(&j, &at, activation, gated, limit);
    }
    const int32_t failed = plan_rows(&j, counts, mask, who->threads);
    if (!failed) {
        const phase phases[] = {ROW_PHASES(j)};
        run_phases(who, &j, phases, 4);
    }
    release(&at);
    return failed;
}

/* y[token] = sum over its pairs of weight * answers[pair], experts ascending; rows have `width` numbers. Returns a failure. */
EXPORT int32_t moiety_combine(const float *answers, int64_t width, const int64_t *token_of, const float *weight_of,
                              int64_t pairs, int64_t tokens, float *y, const crew *who) {
    job j = {.tokens = tokens, .pairs = pairs, .token_of = token_of, .weight_of = weight_of, .answers = (float *)answers,
             .y = y, .second = {.y_width = width}};
    cursor at = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        if (pass && !claim(&at)) return NO_MEMORY;
        take_sum(&j, &at);
    }
    plan_sum(&j);
    const phase phases[] = {{sum_task, tokens}};
    run_phases(who, &j, phases, 1);
    release(&at);
    return DONE;
}

/* Both in one call: y[token] = sum over its pairs of weight * answer. Returns a failure. */
EXPORT int32_t moiety_experts(const matrix *up, const matrix *down, int32_t activation, int32_t gated, float limit,
                              const float *x, int64_t tokens, int64_t x_stride, const int64_t *token_of,
                              const float *weight_of, const int64_t *counts, int64_t pairs, float *y, const crew *who) {
    job j = {.table = table_of(who->level), .up = up, .down = down, .x = x, .tokens = tokens, .x_stride = x_stride,
             .pairs = pairs, .token_of = token_of, .weight_of = weight_of, .y = y};
    cursor at = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        if (pass && !claim(&at)) return NO_MEMORY;
        j.answers = take(&at, pairs * down->rows * 4);
        take_rows(&j, &at, activation, gated, limit);
        take_sum(&j, &at);
    }
    const int32_t failed = plan_rows(&j, counts, NULL, who->threads);
    if (!failed) {
        plan_sum(&j);
        const phase phases[] = {ROW_PHASES(j), {sum_task, tokens}};
        run_phases(who, &j, phases, 5);
    }
    release(&at);
    return failed;
}

/* A matrix that is unpacked: the same weights, transposed. */
typedef struct {
    const level_table *table;
    const matrix *w;
    const uint8_t *tiles;
    int32_t halves, half;
    char *to;
} unpacking;

/* One group of columns: all row blocks of it. */
static void unpack_task(void *data, int64_t group) {
    const unpacking *u = data;
    const matrix *w = u->w;
    const int64_t size = u->half ? 2 : 4, rows = w->rows / u->halves, first = group * w->group;
    const int64_t columns = w->columns - first < w->group ? w->columns - first : w->group;
    for (int64_t b = 0; b < w->row_blocks; b++) { /* gate and up alternate where there are two halves */
        const int64_t row = b / u->halves * ROWS, left = rows - row;
        char *to = u->to + (first * w->rows + b % u->halves * rows + row) * size;
        u->table->unpack(w, u->tiles + (b * w->groups + group) * w->tile_bytes, columns, left < ROWS ? left : ROWS, u->half, to,
                         w->rows * size);
    }
}

/* to[column][row] = the weights of one expert, float32 or bfloat16; `halves` is 2 where its row blocks alternate, else 1. */
EXPORT void moiety_unpack(const matrix *w, int64_t expert, int32_t halves, int32_t half, void *to, const crew *who) {
    unpacking u = {table_of(who->level), w, w->tiles + expert * w->expert_bytes, halves, half, to};
    const phase phases[] = {{unpack_task, w->groups}};
    run_phases(who, &u, phases, 1);
}
