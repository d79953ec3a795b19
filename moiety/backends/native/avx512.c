/* Processors with AVX-512 and VNNI: a vector is a register, four bytes are multiplied and added in one instruction. */
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define LEVEL_NAME avx512
#include "vectors.h"
#include "avx512.h"

const level_table avx512_table = {avx512_product, avx512_prepare, avx512_activate, avx512_peak, CHAINS, avx512_dots, avx512_unpack};
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int not_this_processor;
#endif
