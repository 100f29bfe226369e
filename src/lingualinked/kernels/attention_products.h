// Products of few queries with keys, and of weights with values, in the orders in which MKL computes them with AVX2
// instructions, where numbers are bfloat16 or float16. Which order it is depends on how many queries it multiplies at once.
//
// ALONE: one, in bfloat16. A score is four sums over dimensions, of every fourth one, added as (0 + 2) + (1 + 3). Values of
// four tokens are added in the same way, and then to the result; up to three that are left over one by one, the last first.
//
// FEW: one in float16, two or three. Of the tokens left over from fours, a score is eight sums, each of the second four
// added to one of the first, before these are added. Values are added one by one; in dimensions that are apart, the second
// four of each eight tokens are added up before they are added to the rest.
//
// MANY: four and more. Dimensions, and tokens, are added one by one in chunks, whose sums are added. Scores of fewer than 12
// tokens are computed as those of FEW.
//
// Products are exact in float32, but for those of tiny numbers: MANY adds them as they are (fused), the others round them.
//
// While keys are multiplied, the values of the same tokens are fetched, and meanwhile the next keys: these and those lie in pieces
// too short for the processor to fetch them ahead by itself.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { ALONE, FEW, MANY };
enum { BFLOAT16, FLOAT16 };
enum {
    BLOCK = 512,       // tokens at most
    TILE = 16,         // of them, whose scores are computed together
    LANES = 4,
    MANY_TOKENS = 12,  // from which on dimensions are added one by one
    CHUNK = 192,       // terms that are added up before they are added to others; fewer than two chunks are halved
    MAX_DIM = 256,
    MANY_ROWS = 8,     // queries that are multiplied with a tile one dimension at a time, so that no sum waits for another
};

typedef float scores[BLOCK];  // scores, or weights
typedef __m512 totals[MAX_DIM / 32][2];  // of 32 dimensions each: the two halves in float16, even and odd ones in bfloat16
typedef __mmask16 dims[2];               // some of the first 32 dimensions

// Sixteen numbers as float32.
INLINE __m512 widen(const int dtype, __m256i values) {
    return dtype == FLOAT16 ? _mm512_cvtph_ps(values)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// The first or the second numbers of sixteen pairs, as float32.
INLINE __m512 widen_half(const int dtype, __m512i pairs, const int second) {
    if (dtype == FLOAT16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(second ? _mm512_srli_epi32(pairs, 16) : pairs));
    const __m512i bits = second ? _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(pairs, 16);
    return _mm512_castsi512_ps(bits);
}

// Round to the dtype, half to even; the instruction for bfloat16 would flush denormals.
INLINE __m256i narrow(const int dtype, __m512 value) {
    if (dtype == FLOAT16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0xffff)));
}

// Add a product, which is rounded before or not.
INLINE __m512 add_product(const int is_fused, __m512 a, __m512 b, __m512 sum) {
    return is_fused ? _mm512_fmadd_ps(a, b, sum) : _mm512_add_ps(sum, _mm512_mul_ps(a, b));
}

// Return which of a block's 32 dimensions there are.
INLINE __mmask32 dims_of(long dim, long block) {
    return dim - 32 * block >= 32 ? 0xffffffff : (1u << (dim - 32 * block)) - 1;
}

INLINE long chunk_of(long terms) { return terms <= CHUNK ? terms : terms < 2 * CHUNK ? terms / 2 : CHUNK; }

// Call a function for four rows at a time, or two, or one: registers hold the sums of four.
#define FOR_ROWS(rows, call)                                                                                             \
    for (int row = 0; row < rows;) {                                                                                     \
        if (rows - row >= 4) { enum { NUMBER = 4 }; call; row += 4; }                                                    \
        else if (rows - row >= 2) { enum { NUMBER = 2 }; call; row += 2; }                                               \
        else { enum { NUMBER = 1 }; call; row += 1; }                                                                    \
    }

#define FOR_MANY_ROWS(rows, call)                                                                                        \
    for (int row = 0; row < rows;) {                                                                                     \
        if (rows - row >= MANY_ROWS) { enum { NUMBER = MANY_ROWS }; call; row += MANY_ROWS; }                            \
        else if (rows - row >= 4) { enum { NUMBER = 4 }; call; row += 4; }                                               \
        else if (rows - row >= 2) { enum { NUMBER = 2 }; call; row += 2; }                                               \
        else { enum { NUMBER = 1 }; call; row += 1; }                                                                    \
    }

// Turn up to 16 keys into pairs of dimensions, [dim / 2][keys].
INLINE void transpose_keys(const uint16_t *keys, long stride, long count, long dim, __m512i *pairs) {
    for (long at = 0; at < dim; at += 32, pairs += 16) {
        const __mmask32 mask = dims_of(dim, at / 32);
        __m512i a[16], b[16];
        for (int i = 0; i < 16; i++)
            a[i] = i < count ? _mm512_maskz_loadu_epi16(mask, keys + i * stride + at) : _mm512_setzero_si512();
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int half = 0; half < 2; half++) {
                a[i + 2 * half] = _mm512_unpacklo_epi64(b[i + half], b[i + 2 + half]);
                a[i + 2 * half + 1] = _mm512_unpackhi_epi64(b[i + half], b[i + 2 + half]);
            }
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++) {
                b[i + 8 * half] = _mm512_shuffle_i64x2(a[i + 8 * half], a[i + 8 * half + 4], 0x88);
                b[i + 8 * half + 4] = _mm512_shuffle_i64x2(a[i + 8 * half], a[i + 8 * half + 4], 0xdd);
            }
        for (int i = 0; i < 8; i++) {
            pairs[i] = _mm512_shuffle_i64x2(b[i], b[i + 8], 0x88);
            pairs[i + 8] = _mm512_shuffle_i64x2(b[i], b[i + 8], 0xdd);
        }
    }
}

// Compute scores of a tile, as so many sums over dimensions.
INLINE void score_rows(const int dtype, const int rows, const int lanes, const __m512i *pairs, long dim, const float *query,
                       long query_stride, scores *score, long at, __mmask16 mask) {
    const long chunk = lanes == 1 ? chunk_of(dim) : dim;
    const int step = lanes == 1 ? 2 : lanes;
    __m512 total[MANY_ROWS];
    for (long first = 0; first < dim; first += chunk) {
        __m512 sum[MANY_ROWS][2 * LANES];
        for (int row = 0; row < rows; row++)
            for (int lane = 0; lane < lanes; lane++) sum[row][lane] = _mm512_setzero_ps();
        for (long i = first; i < first + chunk; i += step)
            for (int lane = 0; lane < step; lane++) {
                const __m512 key = widen_half(dtype, pairs[(i + lane) / 2], lane % 2);
                for (int row = 0; row < rows; row++) {
                    __m512 *to = &sum[row][lane % lanes];
                    *to = add_product(lanes == 1, key, _mm512_set1_ps(query[row * query_stride + i + lane]), *to);
                }
            }
        for (int row = 0; row < rows; row++) {
            __m512 *of = sum[row];
            if (lanes == 2 * LANES)
                for (int lane = 0; lane < LANES; lane++) of[lane] = _mm512_add_ps(of[lane], of[lane + LANES]);
            if (lanes > 1) of[0] = _mm512_add_ps(_mm512_add_ps(of[0], of[2]), _mm512_add_ps(of[1], of[3]));
            total[row] = first ? _mm512_add_ps(total[row], of[0]) : of[0];
        }
    }
    for (int row = 0; row < rows; row++) _mm512_mask_storeu_ps(score[row] + at, mask, total[row]);
}

// Keys or values of tokens that will be needed next, in elements.
struct ahead {
    const uint16_t *first;
    long stride;
};

// Fetch 32 dimensions of a token, from one on.
INLINE void fetch(struct ahead ahead, long token, long dim) {
    _mm_prefetch((const char *)(ahead.first + token * ahead.stride + dim), _MM_HINT_T1);
}

// Compute scores of a block of tokens, of those up to the last one that is needed.
INLINE void score_block(const int dtype, const int order, int rows, const uint16_t *keys, long stride, long count, long needed,
                        long dim, const float *query, long query_stride, scores *score, struct ahead ahead) {
    const int one_by_one = order == MANY && count >= MANY_TOKENS;
    const long rest = order == ALONE || one_by_one || (dtype == BFLOAT16 && count == 1) ? 0 : count % LANES;
    __m512i pairs[MAX_DIM / 2];
    for (long at = 0; at < needed; at += TILE) {
        const long size = count - at < TILE ? count - at : TILE;
        const __mmask16 mask = (__mmask16)((1u << size) - 1), last = (__mmask16)(mask & ~((1u << (size - rest)) - 1));
        for (long token = at; token < at + size; token++)
            for (long first = 0; first < dim; first += 32) fetch(ahead, token, first);
        transpose_keys(keys + at * stride, stride, size, dim, pairs);
        if (one_by_one)
            FOR_MANY_ROWS(rows, score_rows(dtype, NUMBER, 1, pairs, dim, query + row * query_stride, query_stride,
                                           score + row, at, mask))
        else
            FOR_ROWS(rows, score_rows(dtype, NUMBER, LANES, pairs, dim, query + row * query_stride, query_stride,
                                      score + row, at, mask))
        for (int row = 0; rest && at + size == count && row < rows; row++)
            score_rows(dtype, 1, 2 * LANES, pairs, dim, query + row * query_stride, query_stride, score + row, at, last);
    }
}

INLINE void load_value(const int dtype, const uint16_t *value, __mmask32 mask, __m512 *half) {
    const __m512i all = _mm512_maskz_loadu_epi16(mask, value);
    half[0] = dtype == FLOAT16 ? widen(dtype, _mm512_castsi512_si256(all)) : widen_half(dtype, all, 0);
    half[1] = dtype == FLOAT16 ? widen(dtype, _mm512_extracti64x4_epi64(all, 1)) : widen_half(dtype, all, 1);
}

// Add weighted values of one token to sums.
INLINE void add_value(const int dtype, const int is_fused, const int rows, const int blocks, const uint16_t *value, __mmask32 mask,
                      const scores *weight, long token, __m512 (*sum)[2][2], struct ahead ahead, long first) {
    for (int block = 0; block < blocks; block++) {
        __m512 half[2];
        fetch(ahead, token, 32 * (first + block));
        load_value(dtype, value + 32 * block, mask, half);
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < 2; i++)
                sum[row][block][i] = add_product(is_fused, half[i], _mm512_set1_ps(weight[row][token]), sum[row][block][i]);
    }
}

// Add weighted values of four tokens to sums, as (0 + 2) + (1 + 3).
INLINE void add_four(const int dtype, const int rows, const int blocks, const uint16_t *value, long stride, __mmask32 mask,
                     const scores *weight, long token, __m512 (*sum)[2][2], struct ahead ahead, long first) {
    for (int block = 0; block < blocks; block++) {
        __m512 four[4][2], by[4];
        for (int i = 0; i < 4; i++) fetch(ahead, token + i, 32 * (first + block));
        for (int i = 0; i < 4; i++) load_value(dtype, value + i * stride + 32 * block, mask, four[i]);
        for (int row = 0; row < rows; row++) {
            for (int i = 0; i < 4; i++) by[i] = _mm512_set1_ps(weight[row][token + i]);
            for (int i = 0; i < 2; i++) {
                const __m512 even = add_product(0, four[2][i], by[2], _mm512_mul_ps(four[0][i], by[0]));
                const __m512 odd = add_product(0, four[3][i], by[3], _mm512_mul_ps(four[1][i], by[1]));
                sum[row][block][i] = _mm512_add_ps(sum[row][block][i], _mm512_add_ps(even, odd));
            }
        }
    }
}

// Add weighted values of some tokens to the totals in one or two blocks of 32 dimensions.
INLINE void add_values(const int dtype, const int order, const int rows, const int blocks, const uint16_t *value, long stride,
                       __mmask32 mask, const scores *weight, long count, long needed, const dims *apart, long block,
                       totals *total, struct ahead ahead) {
    const long chunk = order == MANY ? chunk_of(count) : count;
    for (long first = 0; first < needed; first += chunk) {
        const long end = needed - first < chunk ? needed : first + chunk;
        long token = first;
        __m512 sum[4][2][2];
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < 2 * blocks; i++)
                sum[row][i / 2][i % 2] = order == MANY ? _mm512_setzero_ps() : total[row][block + i / 2][i % 2];
        for (; order == ALONE && token + 4 <= end; token += 4)
            add_four(dtype, rows, blocks, value + token * stride, stride, mask, weight, token, sum, ahead, block);
        for (long rest = end - 1; order == ALONE && rest >= token; rest--)
            add_value(dtype, order == MANY, rows, blocks, value + rest * stride, mask, weight, rest, sum, ahead, block);
        for (; order == FEW && !block && token + 8 <= end; token += 4) {
            for (int i = 0; i < 4; i++, token++)
                add_value(dtype, order == MANY, rows, blocks, value + token * stride, mask, weight, token, sum, ahead, block);
            __m512 before[4][2];
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < 2; i++) {
                    before[row][i] = sum[row][0][i];
                    sum[row][0][i] = _mm512_mask_mov_ps(before[row][i], apart[row][i], _mm512_setzero_ps());
                }
            for (int i = 0; i < 4; i++)
                add_value(dtype, order == MANY, rows, blocks, value + (token + i) * stride, mask, weight, token + i, sum, ahead, block);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < 2; i++)
                    sum[row][0][i] = _mm512_mask_add_ps(sum[row][0][i], apart[row][i], before[row][i], sum[row][0][i]);
        }
        for (; order != ALONE && token < end; token++)
            add_value(dtype, order == MANY, rows, blocks, value + token * stride, mask, weight, token, sum, ahead, block);
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < 2 * blocks; i++) {
                __m512 *to = &total[row][block + i / 2][i % 2];
                *to = order == MANY ? _mm512_add_ps(*to, sum[row][i / 2][i % 2]) : sum[row][i / 2][i % 2];
            }
    }
}

// Add weighted values of some tokens to the totals of some queries.
INLINE void add_rows(const int dtype, const int order, const int rows, const uint16_t *value, long stride, long dim,
                     const scores *weight, long count, long needed, const dims *apart, totals *total, struct ahead ahead) {
    long block = 0;
    for (; block + 2 <= dim / 32; block += 2)
        add_values(dtype, order, rows, 2, value + 32 * block, stride, 0xffffffff, weight, count, needed, apart, block, total,
                   ahead);
    for (; 32 * block < dim; block++)
        add_values(dtype, order, rows, 1, value + 32 * block, stride, dims_of(dim, block), weight, count, needed, apart, block,
                   total, ahead);
}
