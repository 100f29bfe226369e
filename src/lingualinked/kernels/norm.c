// RMS norms of rows in bfloat16, float16 or float32, with the squares summed in the order in which torch sums a row.
//
// Squares are rounded, and added to four registers of eight lanes in turn. After 16 rounds their sums are moved to a second
// level, and after 256 to a third one. The registers that are left over go to the first of the four, then the levels, the other
// three, and at last its lanes, in order, are added to the sum of the values that do not fill a register.
//
// It stands alone: no header but dtypes.h and the compiler's own, no C library, nothing allocated; one thread is done before others begin.

#include <immintrin.h>
#include <stdint.h>

#include "dtypes.h"

enum { WEIGHTED, ROUNDED, ONE_MORE };  // values are multiplied with the weight; are rounded before; with 1 + weight
enum {
    LANES = 8,
    TURNS = 4,
    LEVELS = 3,
    STEP = 16,  // rounds after which a level is moved to the next one
};

struct norm {
    const void *states;  // [rows][size]
    const void *weight;  // [size]
    void *result;        // [rows][size]
    long rows, size;     // size: from LANES to 2^16
    long dtype, kind;
    double epsilon;
};

INLINE float load_one(const int dtype, const void *from, long at) {
    if (dtype == FLOAT32) return ((const float *)from)[at];
    const uint16_t half = ((const uint16_t *)from)[at];
    if (dtype == FLOAT16) return _cvtsh_ss(half);
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(half << 16)));
}

// Add the squares of as many values as there are lanes.
INLINE __m256 add_squares(const int dtype, const void *row, long at, __m256 sum) {
    const __m256 values = load(dtype, row, at);
    return _mm256_add_ps(sum, _mm256_mul_ps(values, values));
}

INLINE float sum_squares(const int dtype, const void *row, long size) {
    __m256 sum[LEVELS][TURNS];
    for (int level = 0; level < LEVELS; level++)
        for (int turn = 0; turn < TURNS; turn++) sum[level][turn] = _mm256_setzero_ps();
    long at = 0;
    // 1) all four registers in turn
    for (long round = 1; at + TURNS * LANES <= size; round++) {
        for (int turn = 0; turn < TURNS; turn++, at += LANES) sum[0][turn] = add_squares(dtype, row, at, sum[0][turn]);
        for (long level = 1, left = round; level < LEVELS && left % STEP == 0; level++, left /= STEP)
            for (int turn = 0; turn < TURNS; turn++) {
                sum[level][turn] = _mm256_add_ps(sum[level][turn], sum[level - 1][turn]);
                sum[level - 1][turn] = _mm256_setzero_ps();
            }
    }
    for (int level = 1; level < LEVELS; level++)
        for (int turn = 0; turn < TURNS; turn++) sum[0][turn] = _mm256_add_ps(sum[0][turn], sum[level][turn]);
    // 2) what fills the first register alone, and the others
    for (; at + LANES <= size; at += LANES) sum[0][0] = add_squares(dtype, row, at, sum[0][0]);
    for (int turn = 1; turn < TURNS; turn++) sum[0][0] = _mm256_add_ps(sum[0][0], sum[0][turn]);
    // 3) what fills none, and the lanes
    float lanes[LANES], total = 0;
    for (; at < size; at++) total += load_one(dtype, row, at) * load_one(dtype, row, at);
    _mm256_storeu_ps(lanes, sum[0][0]);
    for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
    return total;
}

// Scale, weigh, round and store 8 values; return the highest bits of what is rounded.
INLINE __m256i finish(const int dtype, const int kind, const struct norm *n, long offset, long at, __m256 scale, __m256i highest) {
    __m256 values = _mm256_mul_ps(load(dtype, n->states, offset + at), scale);
    if (kind == ROUNDED) {
        highest = highest_bits(highest, values);
        values = round_values(dtype, values);
    }
    __m256 weight = load(dtype, n->weight, at);
    if (kind == ONE_MORE) weight = _mm256_add_ps(_mm256_set1_ps(1), weight);
    values = _mm256_mul_ps(values, weight);
    store(dtype, n->result, offset + at, values);
    return highest_bits(highest, values);
}

INLINE int normalise(const struct norm *n, const int dtype, const int kind) {
    __m256i highest = _mm256_setzero_si256();
    for (long offset = 0; offset < n->rows * n->size; offset += n->size) {
        const float sum = sum_squares(dtype, (const char *)n->states + offset * (dtype == FLOAT32 ? 4 : 2), n->size);
        const __m128 variance = _mm_set_ss(sum / (float)n->size + (float)n->epsilon);
        const __m256 scale = _mm256_broadcastss_ps(_mm_div_ss(_mm_set_ss(1), _mm_sqrt_ss(variance)));
        for (long at = 0; at + LANES <= n->size; at += LANES) highest = finish(dtype, kind, n, offset, at, scale, highest);
        highest = finish(dtype, kind, n, offset, n->size - LANES, scale, highest);
    }
    return are_finite(dtype, highest);
}

INLINE int normalise_kind(const struct norm *n, const int dtype) {
    switch (n->kind) {
        case WEIGHTED: return normalise(n, dtype, WEIGHTED);
        case ROUNDED: return normalise(n, dtype, ROUNDED);
        default: return normalise(n, dtype, ONE_MORE);
    }
}

// Normalise rows; return whether all values that were rounded are finite: the bits of a NaN are not known.
int norm(const struct norm *n) {
    switch (n->dtype) {
        case FLOAT32: return normalise_kind(n, FLOAT32);
        case FLOAT16: return normalise_kind(n, FLOAT16);
        default: return normalise_kind(n, BFLOAT16);
    }
}
