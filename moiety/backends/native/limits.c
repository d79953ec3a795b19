/* What this machine can do at most: bytes read from memory and multiplications in registers, for shares of a limit. */
#include "kernels.h"

typedef struct {
    const uint8_t *const *from;
    const int64_t *bytes;
    int64_t parts;
    int64_t sum[1 << 12];
} reading;

/* One part of the memory, summed so that nothing can be left out. */
static void read_task(void *data, int64_t number) {
    typedef uint64_t lanes __attribute__((vector_size(64), aligned(1), may_alias));
    reading *r = data;
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    const uint8_t *at = r->from[number], *end = at + r->bytes[number] / 256 * 256;
    for (; at < end; at += 256) {
        for (int ahead = 0; ahead < 256; ahead += 64) __builtin_prefetch(at + 3072 + ahead, 0, 3);
        a += *(const lanes *)at, b += *(const lanes *)(at + 64);
        c += *(const lanes *)(at + 128), d += *(const lanes *)(at + 192);
    }
    a += b + c + d;
    uint64_t total = 0;
    for (int i = 0; i < 8; i++) total += a[i];
    for (; at < r->from[number] + r->bytes[number]; at++) total += *at;
    r->sum[number % (1 << 12)] = (int64_t)total;
}

/* Read every part once, with all threads. Returns a sum of what was read. */
EXPORT int64_t moiety_read(const uint8_t *const *from, const int64_t *bytes, int64_t parts, const crew *who) {
    static const reading nothing;
    reading r = nothing;
    r.from = from, r.bytes = bytes, r.parts = parts;
    const phase phases[] = {{read_task, parts}};
    run_phases(who, &r, phases, 1);
    return r.sum[0];
}

typedef struct {
    const level_table *table;
    int64_t rounds;
    int32_t integers;
    float sum[1 << 8];
} multiplying;

static void multiply_task(void *data, int64_t number) {
    multiplying *m = data;
    m->sum[number % (1 << 8)] = m->table->peak(m->integers, m->rounds);
}

/* Multiply in registers, one task for each thread. Returns multiplications and additions of one task. */
EXPORT int64_t moiety_multiply(int32_t integers, int64_t rounds, const crew *who) {
    multiplying m = {.table = table_of(who->level), .rounds = rounds, .integers = integers};
    const phase phases[] = {{multiply_task, who->threads}};
    run_phases(who, &m, phases, 1);
    return rounds * m.table->chains * ROWS * (integers ? 8 : 2);
}
