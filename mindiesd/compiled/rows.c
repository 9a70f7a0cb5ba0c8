/* Block-sparse attention on the CPU, a row of blocks at a time; mindiesd/ops/sparse/compiled.py
 * calls it.
 *
 * For each block of 128 queries, and each of the key blocks it attends to, in turn: scores, weights
 * with the maximum so far (arXiv 1805.02867), weighted sum. All of it fits into a core's second
 * cache. Everything is computed in float32.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define COMPILED_FOR(instructions) __attribute__((target(instructions)))
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
#define BLOCK 128
/* Rows of a power of two would all meet in a few lines of the first cache. */
#define PAD 16
#define SCORES (BLOCK + PAD)
/* Tokens in a group of the estimate, and groups in a block. */
#define GROUP 8
#define GROUPS (BLOCK / GROUP)
/* Groups of keys that are converted at once: whole tiles of six. */
#define CHUNK 24

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* [batch, heads, tokens, ...]: how many elements lie between two of each; the last lie together. */
typedef struct {
    char *data;
    int64_t batch, head, token;
} Operand;

typedef struct {
    Operand query, key, value, out;
    /* The token at each place of the blocked sequence; NULL for the order they are in. */
    const int64_t *order_q, *order_k;
    /* The key blocks of row i of all heads' rows: columns[ends[i]] to columns[ends[i + 1]]. */
    const int64_t *columns, *ends;
    /* shared: query heads of a key head. kind: the elements' type. */
    int64_t heads, shared, queries, keys, dim, value_dim, kind, causal;
    /* scale * log2(e) */
    float factor;
} Call;

typedef struct {
    Operand query, key;
    /* Which groups of queries, ascending. */
    const int64_t *groups;
    /* [batch * heads, blocks of queries, blocks of keys], added to. */
    float *out;
    int64_t heads, shared, queries, keys, dim, kind, causal;
    /* scale / 8 * log2(e) */
    float factor;
} Estimate;

INLINE int64_t bytes(int64_t kind) { return kind == FLOAT32 ? 4 : 2; }

INLINE char *head(const Operand *x, int64_t b, int64_t n, int64_t kind) {
    return x->data + (b * x->batch + n * x->head) * bytes(kind);
}

/* Where the token at a place of a block is. */
INLINE char *token(const Operand *x, const char *head, const int64_t *order, int64_t block,
                   int64_t place, int64_t kind) {
    const int64_t at = block * BLOCK + place;
    return (char *)head + (order ? order[at] : at) * x->token * bytes(kind);
}

/* How many of so many tokens are in a block. */
INLINE int64_t tokens_of(int64_t block, int64_t tokens) {
    const int64_t left = tokens - block * BLOCK;
    return left < BLOCK ? left : BLOCK;
}

/* Into the second cache, without waiting. */
INLINE void fetch(const char *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(from + i, 0, 2);
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float from_half(uint32_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    const uint32_t bits = rest < 0x400u    ? bits_of((float)(int32_t)rest * 0x1p-24f)
                          : rest < 0x7c00u ? (rest << 13) + 0x38000000u
                                           : (rest << 13) + 0x70000000u;
    return float_of(sign | bits);
}

/* To the nearest, ties to even. */
INLINE uint16_t to_half(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7e00u;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;
    /* Below 2^-14: the sum with 1/2 has the half's last place. */
    if (rest < 0x38800000u) return sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u);
    return sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
}

INLINE uint16_t to_bfloat(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

INLINE void widen(float *to, const char *from, int64_t kind, int64_t count) {
    const uint16_t *halves = (const uint16_t *)from;
    if (kind == FLOAT32)
        memcpy(to, from, sizeof(float) * count);
    else if (kind == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)halves[i] << 16);
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_half(halves[i]);
}

INLINE void narrow(char *to, const float *from, int64_t kind, int64_t count) {
    uint16_t *halves = (uint16_t *)to;
    if (kind == FLOAT32)
        memcpy(to, from, sizeof(float) * count);
    else if (kind == BFLOAT16)
        for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat(from[i]);
    else
        for (int64_t i = 0; i < count; i++) halves[i] = to_half(from[i]);
}

/* One TILE of a size known when it is compiled; 8 is 4 + 4, for 6 + 2 takes longer. */
#define IN_TILES(size, left)                                                                  \
    {                                                                                         \
        size = (left) >= 6 && (left) != 8 ? 6 : (left) >= 4 ? 4 : (left) >= 2 ? 2 : 1;        \
        switch (size) {                                                                       \
            case 6: TILE(6); break;                                                           \
            case 4: TILE(4); break;                                                           \
            case 2: TILE(2); break;                                                           \
            default: TILE(1);                                                                 \
        }                                                                                     \
    }

/* The digest of this file and rows.h, as setup.py has it. */
EXPORT const char *mindiesd_made_from(void) { return MADE_FROM; }

#if defined(__x86_64__)

#define TARGET "avx2,fma"
#define NAME(x) x##_avx2
#define LANES 8
#define VECTORS 2
#include "rows.h"
#undef TARGET
#undef NAME
#undef LANES
#undef VECTORS

#define TARGET "avx512f,avx512dq,avx512bw,avx512vl,fma"
#define NAME(x) x##_avx512
#define LANES 16
#define VECTORS 4
#include "rows.h"
#undef TARGET
#undef NAME
#undef LANES
#undef VECTORS

/* The name of the best of these instruction sets here; NULL if there is none. */
EXPORT const char *mindiesd_instructions(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return "avx512";
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "avx2" : NULL;
}

#else

EXPORT const char *mindiesd_instructions(void) { return NULL; }

#endif
