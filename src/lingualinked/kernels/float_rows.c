// A product of few rows with a weight in float32, as torch stores it, summed in the orders in which MKL sums on AMD.
//
// LANES_AFTER_FOUR, of a matrix-vector product: the first four products are added up one by one; then four lanes, the
// first of which holds that sum, add every fourth product. LANES, of two or three rows: four lanes from the beginning.
// Both add the lanes as (0 + 2) + (1 + 3), and round each product before they add it. CHUNKS, of more rows: products are
// added one by one, each with one rounding (fused), in chunks; the sums of chunks are added in order to the bias.
//
// It stands alone: no header but team.h and the compiler's own, no C library, nothing allocated.

#include <immintrin.h>

#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES_AFTER_FOUR, LANES, CHUNKS };
enum {
    LANE_ROWS = 3,      // at most, in one of the orders with lanes
    LANE_OUTPUTS = 4,   // that are computed at once: each adds a product while the others wait for their sums
    CHUNK_ROWS = 8,     // of one register; at most two are used
    CHUNK_OUTPUTS = 8,  // that are computed at once
    LINE = 16,          // inputs of which the weights are fetched at once
    BLOCK = 64,         // outputs of which a thread gets a whole number
};

struct product {
    const float *inputs;      // [rows][length]
    const float *weight;      // [outputs][length]
    const float *bias;        // [outputs], or null
    float *result;            // [rows][outputs]
    float *transposed;        // [length][rows filled up to 8 or 16], for CHUNKS: filled here
    long rows, length, outputs;
    long chunk;               // products that are added up before they are added to the others
    long first_lane_row;      // this and later rows are summed in the order of LANES; the others in the order that is given
    int order;
    struct team team;
};

INLINE float add_lanes(__m128 lanes) {
    const __m128 halves = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
    return _mm_cvtss_f32(_mm_add_ss(halves, _mm_shuffle_ps(halves, halves, 1)));
}

// Fetch a part of the next outputs' weights, in the order in which they lie, while as large a part of these is multiplied:
// without it, products of two rows and more take up to twice as long.
INLINE void fetch_ahead(const float *weight, const int outputs, long length, long at) {
    for (int line = 0; line < outputs; line++)
        _mm_prefetch((const char *)(weight + outputs * (length + at) + LINE * line), _MM_HINT_T1);
}

// Add to the sums of some rows and outputs the products of four inputs each.
INLINE void add_four(const int rows, const int outputs, const float *inputs, const float *weight, long length,
                     __m128 (*sum)[LANE_OUTPUTS]) {
    __m128 input[LANE_ROWS];
    for (int row = 0; row < rows; row++) input[row] = _mm_loadu_ps(inputs + row * length);
    for (int output = 0; output < outputs; output++) {
        const __m128 weights = _mm_loadu_ps(weight + output * length);
        for (int row = 0; row < rows; row++)
            sum[row][output] = _mm_add_ps(sum[row][output], _mm_mul_ps(weights, input[row]));
    }
}

// Compute some outputs of some rows in one of the orders with lanes.
INLINE void sum_lanes(const struct product *p, const int rows, long first_row, const int outputs, long first_output) {
    const long length = p->length;
    const float *weight = p->weight + first_output * length, *inputs = p->inputs + first_row * length;
    __m128 sum[LANE_ROWS][LANE_OUTPUTS];
    long at = p->order == LANES_AFTER_FOUR ? 4 : 0;
    for (int row = 0; row < rows; row++)
        for (int output = 0; output < outputs; output++) {
            const float *left = inputs + row * length, *right = weight + output * length;
            sum[row][output] = at ? _mm_set_ss(left[0] * right[0] + left[1] * right[1] + left[2] * right[2] + left[3] * right[3])
                                  : _mm_setzero_ps();
        }
    for (; at + LINE <= length; at += LINE) {
        fetch_ahead(weight, outputs, length, at);
        for (int part = 0; part < LINE; part += 4)
            add_four(rows, outputs, inputs + at + part, weight + at + part, length, sum);
    }
    for (; at < length; at += 4) add_four(rows, outputs, inputs + at, weight + at, length, sum);
    for (int row = 0; row < rows; row++)
        for (int output = 0; output < outputs; output++) {
            const long place = first_output + output;
            p->result[(first_row + row) * p->outputs + place] = (p->bias ? p->bias[place] : 0) + add_lanes(sum[row][output]);
        }
}

// Add to the sums of some registers of rows and some outputs the products of one input each.
INLINE void add_one(const int registers, const int outputs, const float *inputs, const float *weight, long length,
                    __m256 (*sum)[CHUNK_OUTPUTS]) {
    __m256 input[2];
    for (int part = 0; part < registers; part++) input[part] = _mm256_loadu_ps(inputs + CHUNK_ROWS * part);
    for (int output = 0; output < outputs; output++) {
        const __m256 each = _mm256_broadcast_ss(weight + output * length);
        for (int part = 0; part < registers; part++)
            sum[part][output] = _mm256_fmadd_ps(each, input[part], sum[part][output]);
    }
}

// Compute some outputs of those rows that are summed in chunks.
INLINE void sum_chunks(const struct product *p, const int registers, long rows, const int outputs, long first_output) {
    const long length = p->length, stride = CHUNK_ROWS * registers;
    const float *weight = p->weight + first_output * length, *inputs = p->transposed;
    __m256 total[2][CHUNK_OUTPUTS];
    for (int part = 0; part < registers; part++)
        for (int output = 0; output < outputs; output++)
            total[part][output] = _mm256_set1_ps(p->bias ? p->bias[first_output + output] : 0);
    for (long from = 0; from < length; from += p->chunk) {
        const long to = from + p->chunk < length ? from + p->chunk : length;
        __m256 sum[2][CHUNK_OUTPUTS];
        for (int part = 0; part < registers; part++)
            for (int output = 0; output < outputs; output++) sum[part][output] = _mm256_setzero_ps();
        long at = from;
        for (; at + LINE <= to; at += LINE) {
            fetch_ahead(weight, outputs, length, at);
            for (int one = 0; one < LINE; one++)
                add_one(registers, outputs, inputs + (at + one) * stride, weight + at + one, length, sum);
        }
        for (; at < to; at++) add_one(registers, outputs, inputs + at * stride, weight + at, length, sum);
        for (int part = 0; part < registers; part++)
            for (int output = 0; output < outputs; output++)
                total[part][output] = _mm256_add_ps(total[part][output], sum[part][output]);
    }
    for (int output = 0; output < outputs; output++) {
        float values[2 * CHUNK_ROWS];
        for (int part = 0; part < registers; part++) _mm256_storeu_ps(values + CHUNK_ROWS * part, total[part][output]);
        for (long row = 0; row < rows; row++) p->result[row * p->outputs + first_output + output] = values[row];
    }
}

static long num_chunk_rows(const struct product *p) { return p->order == CHUNKS ? p->first_lane_row : 0; }

static void multiply_outputs(const struct product *p, long from, long to) {
    const long rows = num_chunk_rows(p);
    long output = from;
    if (rows > CHUNK_ROWS) {
        for (; output + 4 <= to; output += 4) sum_chunks(p, 2, rows, 4, output);
        for (; output < to; output++) sum_chunks(p, 2, rows, 1, output);
    } else if (rows) {
        for (; output + CHUNK_OUTPUTS <= to; output += CHUNK_OUTPUTS) sum_chunks(p, 1, rows, CHUNK_OUTPUTS, output);
        for (; output < to; output++) sum_chunks(p, 1, rows, 1, output);
    }
    const long left = p->rows - rows;
    if (!left) return;
    for (output = from; output + LANE_OUTPUTS <= to; output += LANE_OUTPUTS) {
        if (left == 1) sum_lanes(p, 1, rows, LANE_OUTPUTS, output);
        else if (left == 2) sum_lanes(p, 2, rows, LANE_OUTPUTS, output);
        else sum_lanes(p, 3, rows, LANE_OUTPUTS, output);
    }
    for (; output < to; output++)
        for (long row = rows; row < p->rows; row++) sum_lanes(p, 1, row, 1, output);
}

static void multiply_blocks(const void *product, long from, long to) {
    const struct product *p = product;
    multiply_outputs(p, from * BLOCK, to * BLOCK < p->outputs ? to * BLOCK : p->outputs);
}

// Compute the product, with as many threads as it says.
void multiply(struct product *p) {
    const long rows = num_chunk_rows(p), stride = rows > CHUNK_ROWS ? 2 * CHUNK_ROWS : CHUNK_ROWS;
    if (rows)
        for (long at = 0; at < p->length; at++)
            for (long row = 0; row < stride; row++)
                p->transposed[at * stride + row] = row < rows ? p->inputs[row * p->length + at] : 0;
    share_work(&p->team, multiply_blocks, p, (p->outputs + BLOCK - 1) / BLOCK);
}
