/* Products with packed weights on a CPU: what the files of this folder share. The layout of tiles is described in
 * moiety/formats/tiles.py. Plain C; the only state is in the arguments. */
#ifndef MOIETY_KERNELS_H
#define MOIETY_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define ROWS 16 /* of a tile */

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Instruction sets, best last; the numbers are known to cpu.py. */
enum level { LEVEL_PORTABLE, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AMX, LEVELS };

/* What a tile's codes are; the numbers are known to cpu.py. */
enum kind { KIND_FLOAT32, KIND_BFLOAT16, KIND_FLOAT8, KIND_INT8, KIND_INT4, KIND_INT4_MINIMUM, KIND_MXFP4, KIND_NF4, KINDS };

enum activation { ACT_NONE, ACT_SILU, ACT_GELU, ACT_GELU_TANH, ACT_RELU, ACT_CLAMPED, ACTIVATIONS };

/* A stack of packed matrices. The tiles of one, (row_blocks, groups, tile_bytes), follow each other; those of the next lie
 * expert_bytes further on, or each lies where `place` says. */
typedef struct {
    const uint8_t *tiles;
    const int64_t *place; /* (experts) bytes from `tiles` to an expert's, -1 for one that is not in memory; or NULL */
    const float *bias;    /* (experts, row_blocks * 16) in the order of the packed rows, or NULL */
    int64_t experts, row_blocks, groups, tile_bytes, expert_bytes;
    int64_t rows, columns; /* without padding */
    int32_t kind, group;   /* group: columns of a tile */
} matrix;

/* A group of columns of a row's codes. */
typedef struct {
    float scale;
    int32_t sum; /* of the codes; for weights whose zero has a code, minus that code times the sum */
} code_group;

/* Rows to be multiplied, prepared for a kind of matrix: codes of integer kinds, of the others the float32 numbers themselves.
 * Padding columns are zero. */
typedef struct {
    const int8_t *code;      /* (rows, width) */
    const float *value;      /* (rows, width); one of the two is NULL */
    const code_group *group; /* (rows, groups), beside codes */
    int64_t width, groups;   /* width = groups * columns of a group */
} operand;

static inline int is_integer(int32_t kind) { return kind >= KIND_INT8 && kind <= KIND_MXFP4; }

/* out[b][i] = the products of operand rows row[i], i < count, with the 16 weight rows of row block b; there are 1 or 2 row
 * blocks, the second follows the first. */
typedef void (*block_product)(const matrix *w, const uint8_t *tiles, int32_t blocks, const operand *x, const int64_t *row,
                              int64_t count, float (*const *out)[ROWS]);
/* Prepare one row of `columns` float32 numbers as row `into` of an operand. */
typedef void (*prepare_row)(const matrix *w, const float *x, int8_t *code, float *value, code_group *group);
/* hidden[i] = activation(gate[i]) * up[i], 16 numbers; up is NULL without a gate. */
typedef void (*activate_row)(int32_t activation, float limit, const float *gate, const float *up, float *hidden);

typedef struct {
    block_product product;
    prepare_row prepare;
    activate_row activate;
    /* `rounds` times one product of every chain of registers, of integers or floats; the sum, so that none is left out */
    float (*peak)(int32_t integers, int64_t rounds);
    int32_t chains;
    /* out[i] = x[i] . w for at most 4 rows of float32 numbers */
    void (*dots)(const float *const *x, int32_t count, const float *w, int64_t columns, float *out);
    /* The weights that a tile means: column k < `columns` has those of the first `rows` rows at `to` + k * stride bytes, as
     * float32 or, if `half`, rounded to bfloat16 */
    void (*unpack)(const matrix *w, const uint8_t *tile, int64_t columns, int64_t rows, int32_t half, char *to, int64_t stride);
} level_table;

extern const level_table portable_table;
#if defined(__x86_64__)
extern const level_table avx2_table, avx512_table, amx_table;
#endif
const level_table *table_of(int32_t level);

/* Threads: `parallel` has the form of libgomp's GOMP_parallel, so that torch's own threads can be lent; with NULL threads
 * are made for each call. Work is a list of phases; the tasks of one are all done before the next begins. */
typedef void (*parallel_call)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef struct {
    parallel_call parallel;
    int32_t threads, level;
} crew;
typedef void (*task)(void *job, int64_t number);
typedef struct {
    task run;
    int64_t tasks;
} phase;
void run_phases(const crew *who, void *job, const phase *phases, int64_t count);

/* A router that compares softmax or sigmoid scores and takes the best. */
typedef struct {
    int64_t experts, width, k, groups, groups_kept, group_best;
    int32_t sigmoid, renormalize;
    float scale, tiny;       /* tiny: the least sum to divide by (softmax), or what is added to it (sigmoid) */
    const float *gate, *gate_bias, *bias; /* (E, D), (E) or NULL, (E) or NULL: added to scores when comparing */
} router;

/* What a routing of T tokens is written to: room for T * E, T * E, T * K, T * K; then the pairs sorted by expert. */
typedef struct {
    float *logits, *scores;
    int64_t *chosen;
    float *weight;
    int64_t *token_of; /* (T * K) */
    float *weight_of;  /* (T * K) */
    int64_t *counts;   /* (E) */
} routing;

/* Whole operations; see their definitions. */
int32_t moiety_grouped_linear(const matrix *w, const float *x, int64_t rows, int64_t x_stride, const int64_t *counts, float *y,
                              const crew *who);
int32_t moiety_experts(const matrix *up, const matrix *down, int32_t activation, int32_t gated, float limit, const float *x,
                       int64_t tokens, int64_t x_stride, const int64_t *token_of, const float *weight_of,
                       const int64_t *counts, int64_t pairs, float *y, const crew *who);
void moiety_route(const router *r, const float *x, int64_t tokens, int64_t x_stride, const routing *to, const crew *who);
void moiety_rms_norm(float *x, const float *add, const float *weight, float eps, float *out, int64_t rows, int64_t width,
                     const crew *who);

#endif
