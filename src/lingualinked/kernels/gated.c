// Products of functions of gates with other values, in bfloat16 or float16, and sums of two tensors.
//
// A function of numbers of 16 bits is a table, which torch itself has filled. Products and sums are computed in float32, and
// rounded once.
//
// It stands alone: no header but dtypes.h, team.h and the compiler's own, no C library, nothing allocated.

#include "dtypes.h"
#include "team.h"

enum {
    LANES = 8,
    BLOCK = 1 << 12,  // elements that are a thread's least share
};

struct gated {
    const uint16_t *gates, *values;  // [count]
    const uint16_t *table;           // [2^16 + 1], by the bits of a gate; the last one is read, and does not count
    uint16_t *result;                // [count]
    long count, dtype;
    long finite;  // set if all products are
    struct team team;
};

struct sum {
    const void *first, *second;  // [count]
    void *result;
    long count, dtype;
};

// Eight values of the table, which are loaded together with their neighbours.
INLINE __m128i look_up(const uint16_t *table, __m128i gates) {
    const __m256i found = _mm256_i32gather_epi32((const int *)table, _mm256_cvtepu16_epi32(gates), 2);
    const __m256i halves = _mm256_and_si256(found, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

INLINE __m256 product(const int dtype, __m128i functions, const uint16_t *values) {
    return _mm256_mul_ps(load(dtype, &functions, 0), load(dtype, values, 0));
}

INLINE int multiply_gates(const struct gated *g, const int dtype, long from, long to) {
    __m256i highest = _mm256_setzero_si256();
    long at = from;
    for (; at + LANES <= to; at += LANES) {
        const __m128i functions = look_up(g->table, _mm_loadu_si128((const __m128i *)(g->gates + at)));
        const __m256 values = product(dtype, functions, g->values + at);
        store(dtype, g->result, at, values);
        highest = highest_bits(highest, values);
    }
    if (at < to) {
        uint16_t functions[LANES] = {0}, others[LANES] = {0}, results[LANES];
        for (long i = at; i < to; i++) functions[i - at] = g->table[g->gates[i]], others[i - at] = g->values[i];
        const __m256 values = product(dtype, _mm_loadu_si128((const __m128i *)functions), others);
        store(dtype, results, 0, values);
        highest = highest_bits(highest, values);
        for (long i = at; i < to; i++) g->result[i] = results[i - at];
    }
    return are_finite(dtype, highest);
}

static void multiply_blocks(const void *gated, long from, long to) {
    struct gated *g = (struct gated *)gated;
    const long end = to * BLOCK < g->count ? to * BLOCK : g->count;
    const int is_finite = g->dtype == FLOAT16 ? multiply_gates(g, FLOAT16, from * BLOCK, end)
                                              : multiply_gates(g, BFLOAT16, from * BLOCK, end);
    if (!is_finite) __atomic_store_n(&g->finite, 0, __ATOMIC_RELAXED);
}

// Compute products; return whether all are finite: the bits of a NaN are not known.
int gate(struct gated *g) {
    g->finite = 1;
    share_work(&g->team, multiply_blocks, g, (g->count + BLOCK - 1) / BLOCK);
    return (int)g->finite;
}

INLINE int add_all(const struct sum *s, const int dtype) {
    const long size = dtype == FLOAT32 ? 4 : 2;
    __m256i highest = _mm256_setzero_si256();
    long at = 0;
    for (; at + LANES <= s->count; at += LANES) {
        const __m256 values = _mm256_add_ps(load(dtype, s->first, at), load(dtype, s->second, at));
        store(dtype, s->result, at, values);
        highest = highest_bits(highest, values);
    }
    if (at < s->count) {
        char first[4 * LANES] = {0}, second[4 * LANES] = {0}, results[4 * LANES];
        const long bytes = (s->count - at) * size;
        for (long i = 0; i < bytes; i++) {
            first[i] = ((const char *)s->first)[at * size + i];
            second[i] = ((const char *)s->second)[at * size + i];
        }
        const __m256 values = _mm256_add_ps(load(dtype, first, 0), load(dtype, second, 0));
        store(dtype, results, 0, values);
        highest = highest_bits(highest, values);
        for (long i = 0; i < bytes; i++) ((char *)s->result)[at * size + i] = results[i];
    }
    return are_finite(dtype, highest);
}

// Add two tensors; return whether all sums are finite.
int add(const struct sum *s) {
    switch (s->dtype) {
        case FLOAT32: return add_all(s, FLOAT32);
        case FLOAT16: return add_all(s, FLOAT16);
        default: return add_all(s, BFLOAT16);
    }
}
