// Rotary embeddings of one new token per row: each half of a head is multiplied with cosines, and the other one with sines.
//
// Products are rounded to the dtype, and so are their sums.
//
// It stands alone: no header but dtypes.h and the compiler's own, no C library, nothing allocated; one thread is done before
// others begin.

#include "dtypes.h"

enum { LANES = 8 };

struct heads {
    const void *states;        // [rows][count][dim]
    void *result;              // [rows][count][dim], contiguous
    long count;
    long row_stride, stride;   // of states, in elements
};

struct rotary {
    struct heads queries, keys;
    const void *cosines, *sines;  // [rows][dim]
    long angle_stride;            // in elements; 0 if all rows have the same angles
    long rows, dim;               // a multiple of 2 LANES
    long dtype;
};

INLINE __m256i rotate(const int dtype, const struct rotary *r, const struct heads *heads, __m256i highest) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const long half = r->dim / 2;
    for (long head = 0; head < r->rows * heads->count; head++) {
        const long row = head / heads->count, to = head * r->dim, angle = row * r->angle_stride;
        const long from = row * heads->row_stride + head % heads->count * heads->stride;
        for (long at = 0; at < r->dim; at += LANES) {
            const __m256 other = load(dtype, heads->states, from + (at < half ? at + half : at - half));
            const __m256 turned = at < half ? _mm256_xor_ps(other, sign) : other;
            const __m256 cosines = _mm256_mul_ps(load(dtype, heads->states, from + at), load(dtype, r->cosines, angle + at));
            const __m256 sines = _mm256_mul_ps(turned, load(dtype, r->sines, angle + at));
            const __m256 sum = _mm256_add_ps(round_values(dtype, cosines), round_values(dtype, sines));
            highest = highest_bits(highest_bits(highest_bits(highest, cosines), sines), sum);
            store(dtype, heads->result, to + at, sum);
        }
    }
    return highest;
}

INLINE int rotate_both(const struct rotary *r, const int dtype) {
    return are_finite(dtype, rotate(dtype, r, &r->keys, rotate(dtype, r, &r->queries, _mm256_setzero_si256())));
}

// Rotate queries and keys; return whether all values that were rounded are finite: the bits of a NaN are not known.
int rotary(const struct rotary *r) {
    switch (r->dtype) {
        case FLOAT32: return rotate_both(r, FLOAT32);
        case FLOAT16: return rotate_both(r, FLOAT16);
        default: return rotate_both(r, BFLOAT16);
    }
}
