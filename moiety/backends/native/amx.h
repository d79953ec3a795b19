/* Tiles of AMX in six words, by the instructions or, with MOIETY_EMULATE_AMX, by plain C with the same checks: where the
 * processor would raise an illegal instruction, the emulation ends the program. Tile numbers are literals. */
#ifndef MOIETY_AMX_H
#define MOIETY_AMX_H

#define TILES 8

/* What LDTILECFG reads. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[TILES], more_row_bytes[8];
    uint8_t rows[TILES], more_rows[8];
} tile_configuration;

#ifdef MOIETY_EMULATE_AMX

typedef struct {
    tile_configuration now;
    uint8_t line[TILES][16][64];
} tile_registers;
static _Thread_local tile_registers tile_register;

static inline void tile_check(int fine) {
    if (!fine) __builtin_trap();
}

static inline void tile_configure(const tile_configuration *config) {
    const tile_registers nothing = {{0}, {{{0}}}};
    tile_register = nothing;
    tile_check(config->palette == 1 && config->start_row == 0);
    for (int n = 0; n < TILES; n++) {
        tile_check(config->rows[n] <= 16 && config->row_bytes[n] <= 64 && !config->rows[n] == !config->row_bytes[n]);
        tile_check(config->more_rows[n] == 0 && config->more_row_bytes[n] == 0);
    }
    tile_register.now = *config;
}

static inline void tile_release(void) { tile_register.now.palette = 0; }

static inline void tile_check_used(int n) { tile_check(tile_register.now.palette == 1 && tile_register.now.rows[n] > 0); }

static inline void tile_zero(int n) {
    tile_check_used(n);
    memset(tile_register.line[n], 0, sizeof tile_register.line[n]);
}

static inline void tile_load(int n, const void *from, int64_t stride) {
    tile_zero(n);
    for (int i = 0; i < tile_register.now.rows[n]; i++)
        memcpy(tile_register.line[n][i], (const char *)from + i * stride, tile_register.now.row_bytes[n]);
}

static inline void tile_store(int n, void *to, int64_t stride) {
    tile_check_used(n);
    for (int i = 0; i < tile_register.now.rows[n]; i++)
        memcpy((char *)to + i * stride, tile_register.line[n][i], tile_register.now.row_bytes[n]);
}

/* Of every row of `a` and column of `b`, 4 signed bytes with 4 unsigned ones at a time. */
static inline void tile_multiply(int c, int a, int b) {
    const tile_configuration *now = &tile_register.now;
    tile_check_used(a), tile_check_used(b), tile_check_used(c);
    tile_check(c != a && c != b && a != b && now->rows[c] == now->rows[a] && now->row_bytes[c] == now->row_bytes[b]);
    tile_check(now->row_bytes[a] == 4 * now->rows[b] && now->row_bytes[c] % 4 == 0);
    for (int i = 0; i < now->rows[c]; i++)
        for (int n = 0; n < now->row_bytes[c] / 4; n++) {
            int32_t sum;
            memcpy(&sum, tile_register.line[c][i] + 4 * n, sizeof sum);
            for (int k = 0; k < now->row_bytes[a]; k++)
                sum += (int8_t)tile_register.line[a][i][k] * tile_register.line[b][k / 4][4 * n + k % 4];
            memcpy(tile_register.line[c][i] + 4 * n, &sum, sizeof sum);
        }
}

#else

/* gcc 12 does not know that these instructions read memory, and drops or delays what was stored for them. */
#define TILE_MEMORY(at) __asm__ volatile("" : : "r"(at) : "memory")
#define tile_configure(config) (__extension__({ TILE_MEMORY(config); _tile_loadconfig(config); }))
#define tile_release() _tile_release()
#define tile_zero(n) _tile_zero(n)
#define tile_load(n, from, stride) (__extension__({ TILE_MEMORY(from); _tile_loadd(n, from, stride); }))
#define tile_store(n, to, stride) (__extension__({ _tile_stored(n, to, stride); TILE_MEMORY(to); }))
#define tile_multiply(c, a, b) _tile_dpbsud(c, a, b)

#endif
#endif
