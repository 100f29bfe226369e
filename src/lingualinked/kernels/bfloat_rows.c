// A product of few rows with a weight in bfloat16, as torch stores it, summed in the orders in which oneDNN sums with AVX-512
// where the processor has no BF16 instructions, or oneDNN may not use them.
//
// Products are exact, and are added one by one, of two neighbours the odd one first. One row has 16 sums, between which pairs
// go round; the second eight are added to the first eight, and then neighbours until one is left. Several rows have one sum,
// in chunks, each beginning at zero, which are added in order. Results are in float32: who calls adds the bias, and rounds.
//
// It stands alone: no header but team.h and the compiler's own, no C library, nothing allocated.

#include <immintrin.h>
#include <stdint.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    LANES = 16,
    STEP = 2 * LANES,    // inputs of a register: a cache line of a weight
    MAX_ROWS = 16,
    GROUP = 8,           // rows whose sums fit into registers, beside those of a step's weights
    AHEAD = 6144,        // bytes of the weight that are fetched ahead for one row
};

struct product {
    const float *inputs;     // [rows][length]
    const uint16_t *weight;  // bfloat16 [outputs][length]
    float *result;           // [rows][outputs]
    long rows, together;     // the first ones are summed in the order of several rows, all others in that of one
    long length, outputs;    // the length is even
    long chunk;              // inputs whose products are added up before they are added to the others, an even number
    struct team team;
};

INLINE __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE __m512 odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE __mmask16 first(long count) { return count >= LANES ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0; }

// Return the sums with the products of a step of one row and one output.
INLINE __m512 add_step(const float *inputs, const uint16_t *weight, long pairs, __m512 sum) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512 low = _mm512_maskz_loadu_ps(first(2 * pairs), inputs);
    const __m512 high = _mm512_maskz_loadu_ps(first(2 * pairs - LANES), inputs + LANES);
    const __m512i weights = _mm512_maskz_loadu_epi32(first(pairs), weight);
    sum = _mm512_fmadd_ps(_mm512_permutex2var_ps(low, odds, high), odd(weights), sum);
    return _mm512_fmadd_ps(_mm512_permutex2var_ps(low, evens, high), even(weights), sum);
}

INLINE float add_lanes(__m512 lanes) {
    __m256 eight = _mm256_add_ps(_mm512_extractf32x8_ps(lanes, 1), _mm512_castps512_ps256(lanes));
    eight = _mm256_hadd_ps(eight, eight);
    eight = _mm256_hadd_ps(eight, eight);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

// Compute some outputs of one row.
static void multiply_row(const struct product *p, long row, long from, long to) {
    const float *inputs = p->inputs + row * p->length;
    for (long output = from; output < to; output++) {
        const uint16_t *weight = p->weight + output * p->length;
        __m512 sum = _mm512_setzero_ps();
        long at = 0;
        for (; at + STEP <= p->length; at += STEP) {
            _mm_prefetch((const char *)(weight + at) + AHEAD, _MM_HINT_T1);
            sum = add_step(inputs + at, weight + at, LANES, sum);
        }
        if (at < p->length) sum = add_step(inputs + at, weight + at, (p->length - at) / 2, sum);
        p->result[row * p->outputs + output] = 0 + add_lanes(sum);  // never -0
    }
}

// Load a step of some outputs' weights, and bring the outputs of each pair side by side.
INLINE void load_columns(const uint16_t *weight, long length, long outputs, long pairs, __m512i *column) {
    __m512i row[LANES], two[LANES], four[LANES], eight[LANES];
    for (int output = 0; output < LANES; output++)
        row[output] = output < outputs ? _mm512_maskz_loadu_epi32(first(pairs), weight + output * length) : _mm512_setzero_si512();
    for (int i = 0; i < LANES; i += 2) {
        two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + j + 2]);
            four[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + j + 2]);
        }
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < 4; j++) {  // pairs j and j + 8 of eight outputs; j + 4 and j + 12
            eight[i + j] = _mm512_shuffle_i32x4(four[i + j], four[i + j + 4], 0x88);
            eight[i + j + 4] = _mm512_shuffle_i32x4(four[i + j], four[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        column[j] = _mm512_shuffle_i32x4(eight[j], eight[j + 8], 0x88);
        column[j + 8] = _mm512_shuffle_i32x4(eight[j], eight[j + 8], 0xdd);
    }
}

// Add to the sums of some rows and 16 outputs the products of some pairs.
INLINE void add_columns(const int rows, const float *inputs, long length, const __m512i *column, long pairs, float (*sum)[LANES]) {
    __m512 total[GROUP];
    for (int row = 0; row < rows; row++) total[row] = _mm512_loadu_ps(sum[row]);
    for (long pair = 0; pair < pairs; pair++)
        for (int row = 0; row < rows; row++) {
            const float *input = inputs + row * length + 2 * pair;
            total[row] = _mm512_fmadd_ps(_mm512_set1_ps(input[1]), odd(column[pair]), total[row]);
            total[row] = _mm512_fmadd_ps(_mm512_set1_ps(input[0]), even(column[pair]), total[row]);
        }
    for (int row = 0; row < rows; row++) _mm512_storeu_ps(sum[row], total[row]);
}

INLINE void add_rows(long rows, const float *inputs, long length, const __m512i *column, const long pairs, float (*sum)[LANES]) {
    for (; rows > 0; rows -= GROUP, inputs += GROUP * length, sum += GROUP)
        switch (rows) {
            case 1: add_columns(1, inputs, length, column, pairs, sum); break;
            case 2: add_columns(2, inputs, length, column, pairs, sum); break;
            case 3: add_columns(3, inputs, length, column, pairs, sum); break;
            case 4: add_columns(4, inputs, length, column, pairs, sum); break;
            case 5: add_columns(5, inputs, length, column, pairs, sum); break;
            case 6: add_columns(6, inputs, length, column, pairs, sum); break;
            case 7: add_columns(7, inputs, length, column, pairs, sum); break;
            default: add_columns(GROUP, inputs, length, column, pairs, sum);
        }
}

// Compute up to 16 outputs of several rows.
static void multiply_several(const struct product *p, long first_output) {
    const long left = p->outputs - first_output, outputs = left < LANES ? left : LANES;
    const uint16_t *weight = p->weight + first_output * p->length;
    float total[MAX_ROWS][LANES], sum[MAX_ROWS][LANES];
    for (long row = 0; row < p->together; row++) _mm512_storeu_ps(total[row], _mm512_set1_ps(-0.0f));
    for (long from = 0; from < p->length; from += p->chunk) {
        const long to = from + p->chunk < p->length ? from + p->chunk : p->length;
        for (long row = 0; row < p->together; row++) _mm512_storeu_ps(sum[row], _mm512_setzero_ps());
        long at = from;
        __m512i column[LANES];
        for (; at + STEP <= to && outputs == LANES; at += STEP) {
            for (int line = 0; line < LANES; line++)  // a part of the next outputs' weights, in the order in which they lie
                _mm_prefetch((const char *)(weight + LANES * (p->length + at) + STEP * line), _MM_HINT_T1);
            load_columns(weight + at, p->length, LANES, LANES, column);
            add_rows(p->together, p->inputs + at, p->length, column, LANES, sum);
        }
        for (; at < to; at += STEP) {
            const long pairs = to - at < STEP ? (to - at) / 2 : LANES;
            load_columns(weight + at, p->length, outputs, pairs, column);
            add_rows(p->together, p->inputs + at, p->length, column, pairs, sum);
        }
        for (long row = 0; row < p->together; row++)
            _mm512_storeu_ps(total[row], _mm512_add_ps(_mm512_loadu_ps(total[row]), _mm512_loadu_ps(sum[row])));
    }
    for (long row = 0; row < p->together; row++)
        _mm512_mask_storeu_ps(p->result + row * p->outputs + first_output, first(outputs), _mm512_loadu_ps(total[row]));
}

static void multiply_blocks(const void *product, long from, long to) {
    const struct product *p = product;
    for (long block = from; block < to; block++) {
        const long first_output = block * LANES, last = first_output + LANES < p->outputs ? first_output + LANES : p->outputs;
        if (p->together) multiply_several(p, first_output);
        for (long row = p->together; row < p->rows; row++) multiply_row(p, row, first_output, last);
    }
}

// Compute the product, with as many threads as it says.
void multiply(struct product *p) { share_work(&p->team, multiply_blocks, p, (p->outputs + LANES - 1) / LANES); }
