/* Vectors of 16 lanes at one level: loading them, what is made of each lane, and of all of them one number. Included by files
 * that have set LEVEL(name), once for each level. */

#include "exponential.h"

INLINE vf LEVEL(load)(const float *at) {
    vf x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* The first `count` lanes, `other` in those after them. */
INLINE vf LEVEL(first)(vf x, int64_t count, float other) {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return LEVEL(choose)(lane < (int32_t)(count < ROWS ? count : ROWS), x, (vf){} + other);
}

/* 16 stored numbers. */
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

INLINE float LEVEL(sum)(vf x) {
    vf8 half[2];
    vf4 quarter[2];
    memcpy(half, &x, sizeof half);
    half[0] += half[1];
    memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

INLINE float LEVEL(largest)(vf x) {
    vf8 half[2];
    vf4 quarter[2];
    memcpy(half, &x, sizeof half);
    const vi8 left = half[0] > half[1];
    half[0] = (vf8)(((vi8)half[0] & left) | ((vi8)half[1] & ~left));
    memcpy(quarter, half, sizeof quarter);
    const vi4 first = quarter[0] > quarter[1];
    quarter[0] = (vf4)(((vi4)quarter[0] & first) | ((vi4)quarter[1] & ~first));
    const float a = quarter[0][0] > quarter[0][2] ? quarter[0][0] : quarter[0][2];
    const float b = quarter[0][1] > quarter[0][3] ? quarter[0][1] : quarter[0][3];
    return a > b ? a : b;
}
