// A product of few rows with a weight in bfloat16, summed in the order in which oneDNN sums with AVX512-BF16.
//
// Each output is summed along the inputs in chunks. Within a chunk `vdpbf16ps` adds two products at a time, in order,
// beginning at zero; the sums of chunks are added in order in float32, then the bias; the result is rounded once. So a
// weight is read once, in the order in which it lies, and an output depends neither on how many there are nor on who
// computes the others.
//
// It stands alone: no header but team.h and the compiler's own, no C library, nothing allocated.

#include <immintrin.h>
#include <stdint.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    OUTPUTS = 64,   // of a block; their weights lie side by side
    LINES = 4,      // of a pair's weights, each of a cache line
    MAX_ROWS = 64,  // whose totals are kept; others follow with the same block
    GROUP = 6,      // rows whose sums fit into registers: 6 x 4 of 32, beside 4 with weights and one with inputs
};

struct product {
    const char *inputs;    // bfloat16 [rows][2 * pairs]
    const char *weight;    // bfloat16 [blocks][pairs_stored][64][2]: outputs and pairs filled up with zeros
    const uint16_t *bias;  // bfloat16 [outputs], or null
    uint16_t *result;      // bfloat16 [rows][outputs]
    long rows, pairs, pairs_stored, outputs;
    long chunk;            // pairs whose products are added up before they are added to the others
    struct team team;
};

// Add to the totals of some rows the products of some pairs with one block's weights. A line of each pair may be fetched that lies
// so many bytes ahead.
INLINE void add_chunk(const int rows, const int fetches, const char *inputs, long stride, const char *weight, long pairs,
                      float (*total)[OUTPUTS], long ahead) {
    __m512 sum[GROUP][LINES];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < LINES; part++) sum[row][part] = _mm512_setzero_ps();
    for (long pair = 0; pair < pairs; pair++, weight += 4 * OUTPUTS) {
        __m512i weights[LINES];
        for (int part = 0; part < LINES; part++) weights[part] = _mm512_loadu_si512(weight + 64 * part);
        if (fetches) _mm_prefetch(weight + ahead, _MM_HINT_T1);
        for (int row = 0; row < rows; row++) {
            int32_t both;
            __builtin_memcpy(&both, inputs + row * stride + 4 * pair, 4);
            const __m512bh input = (__m512bh)_mm512_set1_epi32(both);
            for (int part = 0; part < LINES; part++)  // the weight comes first, as oneDNN's: of two NaNs the first one's bits stay
                sum[row][part] = _mm512_dpbf16_ps(sum[row][part], (__m512bh)weights[part], input);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < LINES; part++) {
            float *at = total[row] + 16 * part;
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sum[row][part]));
        }
}

INLINE void add_group(long rows, const int fetches, const char *inputs, long stride, const char *weight, long pairs,
                      float (*total)[OUTPUTS], long ahead) {
    switch (rows) {
        case 1: add_chunk(1, fetches, inputs, stride, weight, pairs, total, ahead); break;
        case 2: add_chunk(2, fetches, inputs, stride, weight, pairs, total, ahead); break;
        case 3: add_chunk(3, fetches, inputs, stride, weight, pairs, total, ahead); break;
        case 4: add_chunk(4, fetches, inputs, stride, weight, pairs, total, ahead); break;
        case 5: add_chunk(5, fetches, inputs, stride, weight, pairs, total, ahead); break;
        default: add_chunk(GROUP, fetches, inputs, stride, weight, pairs, total, ahead);
    }
}

// Add to the totals of all rows the products of some pairs, a group of rows after the other.
//
// The first group waits for memory, from which the processor fetches ahead by itself; asking for it as well makes a row 15 %
// slower, and four rows 33 %. Later groups leave memory idle: of four and more, the last ones fetch the next chunk, each a line
// of every pair. The processor has no room for more at once, so that two or three groups gain nothing by it.
static void add_rows(const struct product *p, const char *inputs, const char *weight, long pairs, float (*total)[OUTPUTS]) {
    const long stride = 4 * p->pairs, needed = (p->rows + GROUP - 1) / GROUP;
    if (p->rows < LINES * LINES) {
        for (long row = 0; row < p->rows; row += GROUP)
            add_group(p->rows - row, 0, inputs + row * stride, stride, weight, pairs, total + row, 0);
        return;
    }
    const long groups = needed < LINES ? LINES : needed;
    for (long group = 0; group < groups; group++) {
        const long row = group * p->rows / groups, rows = (group + 1) * p->rows / groups - row, line = group - groups + LINES;
        const char *of_group = inputs + row * stride;
        if (line >= 0)
            add_group(rows, 1, of_group, stride, weight, pairs, total + row, 4 * OUTPUTS * pairs + 64 * line);
        else
            add_group(rows, 0, of_group, stride, weight, pairs, total + row, 0);
    }
}

// Add the bias to one block's totals, round, and store those outputs that there are.
INLINE void store_block(const struct product *p, long block, float (*total)[OUTPUTS]) {
    for (long row = 0; row < p->rows; row++)
        for (int part = 0; part < LINES; part++) {
            const long output = OUTPUTS * block + 16 * part, left = p->outputs - output;
            if (left <= 0) continue;
            const __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            __m512 value = _mm512_loadu_ps(total[row] + 16 * part);
            if (p->bias) {
                const __m256i bias = _mm256_maskz_loadu_epi16(mask, p->bias + output);
                value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
            }
            _mm256_mask_storeu_epi16(p->result + row * p->outputs + output, mask, (__m256i)_mm512_cvtneps_pbh(value));
        }
}

// Compute one block's outputs of up to MAX_ROWS rows.
static void multiply_block(const struct product *p, long block) {
    float total[MAX_ROWS][OUTPUTS];
    const char *weight = p->weight + 4 * OUTPUTS * block * p->pairs_stored;
    for (long row = 0; row < p->rows; row++)  // -0 and a chunk's -0 are -0, which +0 would lose
        for (int part = 0; part < LINES; part++) _mm512_storeu_ps(total[row] + 16 * part, _mm512_set1_ps(-0.0f));
    for (long pair = 0; pair < p->pairs; pair += p->chunk) {
        const long pairs = p->pairs - pair < p->chunk ? p->pairs - pair : p->chunk;
        add_rows(p, p->inputs + 4 * pair, weight + 4 * OUTPUTS * pair, pairs, total);
    }
    store_block(p, block, total);
}

static void multiply_blocks(const void *product, long from, long to) {
    const struct product *all = product;
    const long parts = (all->rows + MAX_ROWS - 1) / MAX_ROWS;
    for (long block = from; block < to; block++)
        for (long part = 0; part < parts; part++) {  // of a block whose weights stay in the processor's own memory
            const long first = part * all->rows / parts;
            struct product p = *all;
            p.rows = (part + 1) * all->rows / parts - first;
            p.inputs += 4 * p.pairs * first;
            p.result += p.outputs * first;
            multiply_block(&p, block);
        }
}

// Compute the product, with as many threads as it says.
void multiply(struct product *p) {
    share_work(&p->team, multiply_blocks, p, (p->outputs + OUTPUTS - 1) / OUTPUTS);
}
