// Attention of one new token per row over a KV cache in bfloat16, in the order in which torch computes it on processors
// where MKL multiplies bfloat16 with AVX2 instructions.
//
// Tokens come in blocks of 512. A score is four sums over dimensions, of every fourth one, added as (0 + 2) + (1 + 3). A
// block's weights are exponentials less the highest score so far, rounded to bfloat16 once they are added up. A result is
// the sum over tokens, four at a time, added as (0 + 2) + (1 + 3); a rest of up to three is added one by one, the last
// one first. Products of two bfloat16 are exact in float32, so it does not matter where they are fused with a sum.
//
// It stands alone: no header but team.h and the compiler's own, no C library, nothing allocated.

#include <immintrin.h>
#include <stdint.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    BLOCK = 512,    // tokens
    KEYS = 8,       // whose scores are computed together
    MAX_DIM = 256,
};

struct strides { long batch, head, token; };  // in elements

struct attention {
    const uint16_t *query, *keys, *values;  // bfloat16 [batch][heads][1][dim], twice [batch][heads / group][tokens][dim]
    uint16_t *result;                       // bfloat16 [batch][1][heads][dim]
    float *logsums;                         // [batch][heads], logarithms of the sums of exponentials; or null
    struct strides of_query, of_keys, of_values;
    long batch, heads, group, tokens, dim;  // a group of heads shares keys and values; dim is a multiple of 8
    double scale;
    double (*exponential)(double);                                   // exp, for weights that do not fill a vector
    float (*exponential32)(float), (*logarithm)(float);              // expf, logf
    struct team team;
};

// Every other of 32 bfloat16, beginning with the first or the second, as float32.
INLINE __m512 even(__m512i both) { return _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)); }
INLINE __m512 odd(__m512i both) {
    return _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE float widen(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, 4);
    return wide;
}

// Round to bfloat16, half to even; the instruction for it would flush denormals.
INLINE __m256i round16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0xffff)));
}

// Scores of up to 8 keys; `pairs` has the query by four dimensions, as (0, 2) and (1, 3).
INLINE void score_keys(const uint16_t *keys, long stride, int count, long dim, const double (*pairs)[2], float *scores) {
    __m512 sum_even = _mm512_setzero_ps(), sum_odd = _mm512_setzero_ps();
    for (long at = 0; at < dim; at += 32, pairs += 8) {
        const __mmask32 mask = dim - at >= 32 ? 0xffffffff : (1u << (dim - at)) - 1;
        __m512i row[KEYS], two[KEYS], four[KEYS], column[8];
        for (int key = 0; key < KEYS; key++)
            row[key] = key < count ? _mm512_maskz_loadu_epi16(mask, keys + key * stride + at) : _mm512_setzero_si512();
        for (int i = 0; i < 4; i++) {
            two[i] = _mm512_unpacklo_epi64(row[2 * i], row[2 * i + 1]);
            two[4 + i] = _mm512_unpackhi_epi64(row[2 * i], row[2 * i + 1]);
        }
        for (int half = 0; half < 2; half++) {
            __m512i *to = four + 4 * half;
            const __m512i *from = two + 4 * half;
            to[0] = _mm512_shuffle_i64x2(from[0], from[1], 0x88);
            to[1] = _mm512_shuffle_i64x2(from[2], from[3], 0x88);
            to[2] = _mm512_shuffle_i64x2(from[0], from[1], 0xdd);
            to[3] = _mm512_shuffle_i64x2(from[2], from[3], 0xdd);
            column[half] = _mm512_shuffle_i64x2(to[0], to[1], 0x88);
            column[4 + half] = _mm512_shuffle_i64x2(to[0], to[1], 0xdd);
            column[2 + half] = _mm512_shuffle_i64x2(to[2], to[3], 0x88);
            column[6 + half] = _mm512_shuffle_i64x2(to[2], to[3], 0xdd);
        }
        for (int i = 0; i < 8; i++) {  // the query is zero beyond its dimensions
            sum_even = _mm512_fmadd_ps(even(column[i]), _mm512_castpd_ps(_mm512_set1_pd(pairs[i][0])), sum_even);
            sum_odd = _mm512_fmadd_ps(odd(column[i]), _mm512_castpd_ps(_mm512_set1_pd(pairs[i][1])), sum_odd);
        }
    }
    sum_even = _mm512_add_ps(sum_even, _mm512_permute_ps(sum_even, 0xb1));
    sum_odd = _mm512_add_ps(sum_odd, _mm512_permute_ps(sum_odd, 0xb1));
    const __m512i sums = _mm512_castps_si512(_mm512_add_ps(sum_even, sum_odd));
    _mm256_mask_storeu_epi32(scores, (__mmask8)((1u << count) - 1), _mm512_cvtepi64_epi32(sums));
}

INLINE __m512 maximum(__m512 a, __m512 b) {  // NaN if one is
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), is_nan, _mm512_castsi512_ps(_mm512_set1_epi32(-1)));
}

#define REDUCE(combine, value)                                                 \
    value = combine(value, _mm512_shuffle_f32x4(value, value, 0x4e));          \
    value = combine(value, _mm512_shuffle_f32x4(value, value, 0xb1));          \
    value = combine(value, _mm512_permute_ps(value, 0x4e));                    \
    value = combine(value, _mm512_permute_ps(value, 0xb1));

// Scale scores in place and return the highest one.
INLINE float scale_scores(float *scores, long count, float scale) {
    const float lowest = -__builtin_inff();
    const long whole = count & ~15l;
    __m512 highest = _mm512_set1_ps(lowest);
    for (long at = 0; at < whole; at += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(scale));
        highest = maximum(highest, scaled);
        _mm512_storeu_ps(scores + at, scaled);
    }
    float top = lowest;
    for (long at = whole; at < count; at++) {
        scores[at] *= scale;
        top = top < scores[at] ? scores[at] : top;
    }
    REDUCE(maximum, highest)
    const float other = _mm512_cvtss_f32(highest);
    return other < top ? top : other;  // NaN of the whole vectors, but not of the rest
}

// The exponential as torch approximates it here: 2^x less a cubic of the fraction, written into the exponent's bits
// (Malossi, Ineichen, Bekas and Curioni, Fast exponential computation on SIMD architectures, 2015).
INLINE __m512 approximate_exp(__m512 value) {
    const float log2_e = 0x1.715476p+0f, smallest = -0x1.5d58ap+6f, largest = 0x1.62e43p+6f;
    const __m512 power = _mm512_mul_ps(value, _mm512_set1_ps(log2_e));
    const __m512 fraction = _mm512_sub_ps(power, _mm512_roundscale_ps(power, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    __m512 cubic = _mm512_fmadd_ps(fraction, _mm512_set1_ps(-0.079204240219773236f), _mm512_set1_ps(-0.22433836478672356f));
    cubic = _mm512_fmadd_ps(fraction, cubic, _mm512_set1_ps(0.30354260500649682f));
    cubic = _mm512_fmadd_ps(fraction, cubic, _mm512_set1_ps(0.00010703434948458272f));
    const __m512 bits = _mm512_fmadd_ps(_mm512_set1_ps(0x1p23f), _mm512_sub_ps(power, cubic), _mm512_set1_ps(0x1p23f * 127));
    __m512i result = _mm512_cvttps_epi32(bits);
    result = _mm512_mask_mov_epi32(result, _mm512_cmp_ps_mask(value, _mm512_set1_ps(smallest), _CMP_LT_OS), _mm512_setzero_si512());
    result = _mm512_mask_mov_epi32(result, _mm512_cmp_ps_mask(value, _mm512_set1_ps(largest), _CMP_GT_OS), _mm512_set1_epi32(0x7f800000));
    return _mm512_castsi512_ps(result);
}

// Replace scores by weights, rounded to bfloat16 but stored as float32; return the sum of what they were before.
INLINE float weigh_scores(const struct attention *a, float *scores, long count, float highest) {
    const long whole = count & ~15l;
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};  // of every other 16
    for (long at = 0; at < whole; at += 16) {
        const __m512 weights = approximate_exp(_mm512_sub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(highest)));
        sums[at / 16 % 2] = _mm512_add_ps(sums[at / 16 % 2], weights);
        _mm512_storeu_si512(scores + at, _mm512_slli_epi32(_mm512_cvtepu16_epi32(round16(weights)), 16));
    }
    __m512 both = _mm512_add_ps(sums[0], sums[1]);
    REDUCE(_mm512_add_ps, both)
    float sum = _mm512_cvtss_f32(both);
    for (long at = whole; at < count; at++) {
        const float weight = (float)a->exponential(scores[at] - highest);
        sum += weight;
        const __m512i rounded = _mm512_slli_epi32(_mm512_cvtepu16_epi32(round16(_mm512_set1_ps(weight))), 16);
        scores[at] = _mm512_cvtss_f32(_mm512_castsi512_ps(rounded));
    }
    return sum;
}

// Add weighted values of some tokens to the totals of some blocks of 32 dimensions, even and odd ones apart.
INLINE void add_values(const int blocks, const uint16_t *values, long stride, __mmask32 mask, const float *weights, long count,
                       float (*total)[2][16]) {
    __m512 sum[2][2];
    for (int block = 0; block < blocks; block++)
        for (int half = 0; half < 2; half++) sum[block][half] = _mm512_loadu_ps(total[block][half]);
    const long whole = count & ~3l;
    for (long token = 0; token < whole; token += 4, values += 4 * stride)
        for (int block = 0; block < blocks; block++) {
            __m512i row[4];
            __m512 weight[4];
            for (int i = 0; i < 4; i++) {
                row[i] = _mm512_maskz_loadu_epi16(mask, values + i * stride + 32 * block);
                weight[i] = _mm512_set1_ps(weights[token + i]);
            }
            const __m512 evens = _mm512_add_ps(_mm512_fmadd_ps(even(row[2]), weight[2], _mm512_mul_ps(even(row[0]), weight[0])),
                                               _mm512_fmadd_ps(even(row[3]), weight[3], _mm512_mul_ps(even(row[1]), weight[1])));
            const __m512 odds = _mm512_add_ps(_mm512_fmadd_ps(odd(row[2]), weight[2], _mm512_mul_ps(odd(row[0]), weight[0])),
                                              _mm512_fmadd_ps(odd(row[3]), weight[3], _mm512_mul_ps(odd(row[1]), weight[1])));
            sum[block][0] = _mm512_add_ps(sum[block][0], evens);
            sum[block][1] = _mm512_add_ps(sum[block][1], odds);
        }
    for (long rest = count - whole - 1; rest >= 0; rest--)
        for (int block = 0; block < blocks; block++) {
            const __m512i row = _mm512_maskz_loadu_epi16(mask, values + rest * stride + 32 * block);
            const __m512 weight = _mm512_set1_ps(weights[whole + rest]);
            sum[block][0] = _mm512_fmadd_ps(even(row), weight, sum[block][0]);
            sum[block][1] = _mm512_fmadd_ps(odd(row), weight, sum[block][1]);
        }
    for (int block = 0; block < blocks; block++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(total[block][half], sum[block][half]);
}

static void attend(const struct attention *a, long batch, long head) {
    const long dim = a->dim, blocks = (dim + 31) / 32;
    const uint16_t *query = a->query + batch * a->of_query.batch + head * a->of_query.head;
    const uint16_t *keys = a->keys + batch * a->of_keys.batch + head / a->group * a->of_keys.head;
    const uint16_t *values = a->values + batch * a->of_values.batch + head / a->group * a->of_values.head;
    const __mmask32 last = dim % 32 ? (1u << dim % 32) - 1 : 0xffffffff;
    float split[MAX_DIM / 4][2][2], scores[BLOCK], total[MAX_DIM / 32][2][16];
    for (long at = 0; at < 32 * blocks; at++) split[at / 4][at % 2][at / 2 % 2] = at < dim ? widen(query[at]) : 0;
    for (long block = 0; block < blocks; block++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(total[block][half], _mm512_setzero_ps());
    float highest = -__builtin_inff(), sum = 0;
    for (long first = 0; first < a->tokens; first += BLOCK) {
        // 1) scores of the block
        const long count = a->tokens - first < BLOCK ? a->tokens - first : BLOCK;
        const uint16_t *key = keys + first * a->of_keys.token, *value = values + first * a->of_values.token;
        long at = 0;
        for (; at + KEYS <= count; at += KEYS)
            score_keys(key + at * a->of_keys.token, a->of_keys.token, KEYS, dim, (const double(*)[2])split, scores + at);
        if (at < count)
            score_keys(key + at * a->of_keys.token, a->of_keys.token, (int)(count - at), dim, (const double(*)[2])split, scores + at);
        // 2) weights; what was added up for lower scores shrinks
        const float top = scale_scores(scores, count, (float)a->scale), before = highest;
        const float new_highest = before > top ? before : top;
        if (new_highest == -__builtin_inff()) {
            for (long token = 0; token < count; token++) scores[token] = 0;
        } else {
            const float added = weigh_scores(a, scores, count, new_highest);
            const float shrink = a->exponential32(before - new_highest);
            sum = __builtin_fmaf(shrink, sum, added);
            highest = new_highest;
            if (first)
                for (long block = 0; block < blocks; block++)
                    for (int half = 0; half < 2; half++)
                        _mm512_storeu_ps(total[block][half], _mm512_mul_ps(_mm512_loadu_ps(total[block][half]), _mm512_set1_ps(shrink)));
        }
        // 3) weighted values
        long block = 0;
        for (; block + 2 <= blocks - (dim % 32 != 0); block += 2)
            add_values(2, value + 32 * block, a->of_values.token, 0xffffffff, scores, count, total + block);
        for (; block < blocks; block++)
            add_values(1, value + 32 * block, a->of_values.token, block + 1 < blocks ? 0xffffffff : last, scores, count, total + block);
    }
    // 4) divide by the sum of weights
    if (sum == 0) sum = 1;
    if (a->logsums) a->logsums[batch * a->heads + head] = (highest == -__builtin_inff() ? 0 : highest) + a->logarithm(sum);
    const __m512 share = _mm512_set1_ps(1 / sum);
    uint16_t *result = a->result + (batch * a->heads + head) * dim;
    for (long block = 0; block < blocks; block++) {
        const __m512i evens = _mm512_cvtepu16_epi32(round16(_mm512_mul_ps(_mm512_loadu_ps(total[block][0]), share)));
        const __m512i odds = _mm512_cvtepu16_epi32(round16(_mm512_mul_ps(_mm512_loadu_ps(total[block][1]), share)));
        const __m512i both = _mm512_or_si512(evens, _mm512_slli_epi32(odds, 16));
        _mm512_mask_storeu_epi16(result + 32 * block, block + 1 < blocks ? 0xffffffff : last, both);
    }
}

static void attend_share(const void *attention, long from, long to) {
    const struct attention *a = attention;
    for (long at = from; at < to; at++) attend(a, at / a->heads, at % a->heads);
}

// Compute attention, with as many threads as it says.
void attention(struct attention *a) {
    share_work(&a->team, attend_share, a, a->batch * a->heads);
}
