// A product of few rows with a weight in float16 or bfloat16, as torch stores it, summed in the order in which torch's own
// dot products sum.
//
// Products are exact, and are added to 64 sums in turn. Of these the second half is added to the first, until one is left.
// The products of what is left over of the inputs are added to 8 sums, which are added up in the same way and then to the
// other sum. Results are in float32: who calls adds the bias, and rounds.
//
// It stands alone: no header but team.h and the compiler's own, no C library, nothing allocated.

#include <immintrin.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    WIDTH = 8,     // sums in a register
    SUMS = 64,
    GROUP = 6,     // rows that are multiplied at once, with two registers of sums each; two or three with four, one with all
    LINE = 4,      // registers whose weights are fetched at once
    BLOCK = 32,    // outputs of which a thread gets a whole number
};

struct product {
    const float *inputs;           // [rows][length]
    const unsigned short *weight;  // [outputs][length], of two bytes each
    float *result;                 // [rows][outputs]
    long rows, length, outputs;
    int is_bfloat16;
    struct team team;
};

INLINE __m256 widen(const unsigned short *at, const int is_bfloat16) {
    const __m128i halves = _mm_loadu_si128((const __m128i *)at);
    return is_bfloat16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)) : _mm256_cvtph_ps(halves);
}

// Add up, by halves, as many sums as lie from an address on.
INLINE float add_halves(const float *from, const int count) {
    __m256 sum[SUMS / WIDTH];
    for (int at = 0; at < count / WIDTH; at++) sum[at] = _mm256_loadu_ps(from + WIDTH * at);
    for (int half = count / WIDTH / 2; half; half /= 2)
        for (int at = 0; at < half; at++) sum[at] = _mm256_add_ps(sum[at], sum[half + at]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum[0]), _mm256_extractf128_ps(sum[0], 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// Compute some of the sums, which are neighbours, of some rows and one output.
INLINE void add_products(const int is_bfloat16, const int rows, const int registers, const float *inputs, long stride,
                         const unsigned short *weight, long length, int first_sum, float (*sum)[SUMS]) {
    __m256 total[GROUP][SUMS / WIDTH];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < registers; part++) total[row][part] = _mm256_setzero_ps();
    const long ahead = rows == 1 ? 6144 : 10240;  // bytes: measured; into the second cache, since the first one has the inputs
    for (long at = first_sum; at < length; at += SUMS) {
        for (int part = 0; part < registers; part += LINE)
            _mm_prefetch((const char *)(weight + at + WIDTH * part) + ahead, _MM_HINT_T1);
        for (int part = 0; part < registers; part++) {
            const __m256 weights = widen(weight + at + WIDTH * part, is_bfloat16);
            for (int row = 0; row < rows; row++)
                total[row][part] =
                    _mm256_fmadd_ps(weights, _mm256_loadu_ps(inputs + row * stride + at + WIDTH * part), total[row][part]);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < registers; part++) _mm256_storeu_ps(sum[row] + first_sum + WIDTH * part, total[row][part]);
}

// Compute one output of some rows.
INLINE void multiply_rows(const struct product *p, const int is_bfloat16, const int rows, const int registers,
                          long first_row, long output) {
    const long whole = p->length / SUMS * SUMS;
    const float *inputs = p->inputs + first_row * p->length;
    const unsigned short *weight = p->weight + output * p->length;
    float sum[GROUP][SUMS];
    for (int first = 0; first < SUMS; first += WIDTH * registers)
        add_products(is_bfloat16, rows, registers, inputs, p->length, weight, whole, first, sum);
    for (int row = 0; row < rows; row++) {
        float left[WIDTH];
        __m256 total = _mm256_setzero_ps();
        for (long at = whole; at < p->length; at += WIDTH)
            total = _mm256_fmadd_ps(widen(weight + at, is_bfloat16), _mm256_loadu_ps(inputs + row * p->length + at), total);
        _mm256_storeu_ps(left, total);
        p->result[(first_row + row) * p->outputs + output] = add_halves(sum[row], SUMS) + add_halves(left, WIDTH);
    }
}

INLINE void multiply_outputs(const struct product *p, const int is_bfloat16, long from, long to) {
    for (long output = from; output < to; output++)
        for (long row = 0; row < p->rows; row += GROUP)
            switch (p->rows - row) {
                case 1: multiply_rows(p, is_bfloat16, 1, 8, row, output); break;
                case 2: multiply_rows(p, is_bfloat16, 2, 4, row, output); break;
                case 3: multiply_rows(p, is_bfloat16, 3, 4, row, output); break;
                case 4: multiply_rows(p, is_bfloat16, 4, 2, row, output); break;
                case 5: multiply_rows(p, is_bfloat16, 5, 2, row, output); break;
                default: multiply_rows(p, is_bfloat16, GROUP, 2, row, output);
            }
}

static void multiply_blocks(const void *product, long from, long to) {
    const struct product *p = product;
    const long last = to * BLOCK < p->outputs ? to * BLOCK : p->outputs;
    if (p->is_bfloat16) multiply_outputs(p, 1, from * BLOCK, last);
    else multiply_outputs(p, 0, from * BLOCK, last);
}

// Compute the product, with as many threads as it says.
void multiply(struct product *p) {
    share_work(&p->team, multiply_blocks, p, (p->outputs + BLOCK - 1) / BLOCK);
}
