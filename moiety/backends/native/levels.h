/* Includes TILE once for each level: a file of functions named by LEVEL, whose vectors have the LANES of a register. For code
 * that is floats alone: what needs instructions of its own has a file for each level. */
#define vf LEVEL(vf)
#define vi LEVEL(vi)
#define vu LEVEL(vu)
#define vh LEVEL(vh)
#define vb LEVEL(vb)
#define v4 LEVEL(v4)
#define v4i LEVEL(v4i)

#define LEVEL_NAME portable
#define LANES 4
#include TILE
#undef LANES
#undef LEVEL_NAME

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LEVEL_NAME avx2
#define LANES 8
#include TILE
#undef LANES
#undef LEVEL_NAME
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define LEVEL_NAME avx512
#define LANES 16
#include TILE
#undef LANES
#undef LEVEL_NAME
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
