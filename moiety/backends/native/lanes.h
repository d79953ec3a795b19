/* Vectors of LANES numbers at one level: loading them, what is made of each lane, and of all of them one number. Included by
 * what levels.h includes, once for each level. */

#include "registers.h"

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

#include "exponential.h"

INLINE vf LEVEL(load)(const float *at) {
    vf x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* 0, 1, 2, ... */
INLINE vi LEVEL(numbers)(void) {
    static const int32_t all[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vi x;
    memcpy(&x, all, sizeof x);
    return x;
}

/* The first `count` lanes, `other` in those after them. */
INLINE vf LEVEL(first)(vf x, int64_t count, float other) {
    return LEVEL(choose)(LEVEL(numbers)() < (int32_t)(count < LANES ? count : LANES), x, (vf){} + other);
}

/* As many stored numbers. */
INLINE vf LEVEL(stored)(int bfloat16, const char *at) {
    if (!bfloat16) return LEVEL(load)((const float *)at);
    vh half;
    memcpy(&half, at, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

/* tanh by exponentials, and where 1 - exp would cancel by a polynomial. */
INLINE vf LEVEL(tangent)(vf x) {
    const vf zero = {}, size = LEVEL(choose)(x < zero, -x, x), square = x * x;
    const vf decay = LEVEL(exponential)(size * -2.0f), y = 1.0f - 2.0f * decay / (1.0f + decay);
    vf p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    return LEVEL(choose)(size < 0.625f, x + x * square * p, LEVEL(choose)(x < zero, -y, y));
}

INLINE vf LEVEL(capped)(vf x, float cap) { return cap * LEVEL(tangent)(x / cap); }

/* Halves are added until one number is left. */
INLINE float LEVEL(sum)(vf x) {
    v4 part[LANES / 4];
    memcpy(part, &x, sizeof part);
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

INLINE float LEVEL(largest)(vf x) {
    v4 part[LANES / 4];
    memcpy(part, &x, sizeof part);
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++) {
            const v4i left = part[i] > part[i + n];
            part[i] = (v4)(((v4i)part[i] & left) | ((v4i)part[i + n] & ~left));
        }
    const float a = part[0][0] > part[0][2] ? part[0][0] : part[0][2];
    const float b = part[0][1] > part[0][3] ? part[0][1] : part[0][3];
    return a > b ? a : b;
}
