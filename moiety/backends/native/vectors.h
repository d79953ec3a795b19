/* What every level's vectors have in common. */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define PASTE(a, b) a##_##b
#define JOIN(a, b) PASTE(a, b)
#define LEVEL(name) JOIN(LEVEL_NAME, name)
#define PREFETCH_BYTES 3072
#define PIECE_BYTES (12 << 10) /* of tiles, to be found in the first cache by every set of rows */
#define READY_BYTES (32 << 10) /* of unpacked tiles, which every set of rows finds there */

/* Groups of columns; how many bytes lie between the end of a row block and what is multiplied after it; whether the tiles were
 * just read. */
typedef struct {
    int64_t from, to, skip;
    int warm;
} span;

/* Quantiles of the normal distribution (arXiv 2305.14314), as in moiety/formats. */
#define MOIETY_NF4                                                                                                     \
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,                  \
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,                   \
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}
