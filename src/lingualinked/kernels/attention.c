// Attention of new tokens over a KV cache in bfloat16 or float16, as torch computes it where MKL multiplies in the orders
// of attention_products.h.
//
// Tokens come in blocks of 512. A block's weights are exponentials less the highest score so far, rounded to the dtype once
// they are added up. Queries that share keys and values are computed together, whatever torch does.
//
// It stands alone: no headers but its own, team.h and the compiler's, no C library, nothing allocated.

#include "attention_products.h"
#include "team.h"

// True for tokens that count; what is added to scores, in the dtype; queries and tokens are the same, and see none that follow.
enum { NO_MASK, CHOICES, ADDENDS, CAUSAL };
enum {
    ROWS = 32,           // queries that are computed together
    LARGEST_POWER = 56,  // products of two such numbers, added up over all dimensions and scaled, are finite
    LARGEST_SCALE = 64,
};

struct strides { long batch, head, token; };  // in elements

INLINE long place(const struct strides *of, long batch, long head, long token) {
    return batch * of->batch + head * of->head + token * of->token;
}

// One of several texts of different lengths, with one new token each, whose keys and values lie anywhere.
struct text {
    uint16_t *keys;            // [heads / group][tokens][dim]
    long key_head, key_token;  // strides
    uint16_t *values;
    long value_head, value_token;
    long tokens;
    long place;    // of its new token among all queries and results
    long appends;  // whether the new key and value, at this place as well, are still to become the last ones
};

struct attention {
    const uint16_t *query, *keys, *values;  // [batch][heads][queries][dim], twice [batch][heads / group][tokens][dim]
    uint16_t *result;                       // [batch][queries][heads][dim]
    float *logsums;                         // [batch][heads][queries], logarithms of the sums of exponentials; or null
    const void *mask;                       // [batch][heads][queries][tokens]; or null
    struct strides of_query, of_keys, of_values, of_mask;
    long batch, heads, group, queries, tokens, dim;  // a group of heads shares keys and values; dim is a multiple of 8
    long together;                                   // queries that torch multiplies at once: of one head, or of one group
    long dtype, mask_kind;
    double scale;
    double (*exponential)(double);                       // exp, for weights that do not fill a vector
    float (*exponential32)(float), (*logarithm)(float);  // expf, logf
    const struct text *texts;  // in place of batch, keys, values and tokens, with one query each; or null
    long num_texts;            // then keys and values are new ones, [1][heads / group][places][dim]
    struct team team;
};

INLINE struct text text_of(const struct attention *a, long batch) {
    if (a->texts) return a->texts[batch];
    return (struct text){(uint16_t *)a->keys + batch * a->of_keys.batch, a->of_keys.head, a->of_keys.token,
                         (uint16_t *)a->values + batch * a->of_values.batch, a->of_values.head, a->of_values.token,
                         a->tokens, 0, 0};
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

// Scale scores in place, add what a mask says, and return the highest one; of causal ones so many are seen.
INLINE float scale_scores(const int dtype, float *score, long count, float scale, const void *mask, long mask_kind, long seen) {
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    __m512 highest = lowest;
    float top = -__builtin_inff();
    for (long at = 0; at < count; at += 16) {
        const __mmask16 some = count - at >= 16 ? 0xffff : (__mmask16)((1u << (count - at)) - 1);
        __m512 scaled = _mm512_maskz_loadu_ps(some, score + at);
        if (mask_kind == CHOICES) {
            const __m128i chosen = _mm_maskz_loadu_epi8(some, (const uint8_t *)mask + at);
            const __m512 added = _mm512_mask_mov_ps(lowest, _mm_test_epi8_mask(chosen, chosen), _mm512_setzero_ps());
            scaled = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale), added);
        } else if (mask_kind == ADDENDS) {
            const __m256i added = _mm256_maskz_loadu_epi16(some, (const uint16_t *)mask + at);
            scaled = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale), widen(dtype, added));
        } else {
            const long left = seen - at;
            if (mask_kind == CAUSAL && left < 16)
                scaled = _mm512_mask_mov_ps(lowest, left < 1 ? 0 : (__mmask16)((1u << left) - 1), scaled);
            scaled = _mm512_mul_ps(scaled, _mm512_set1_ps(scale));
        }
        _mm512_mask_storeu_ps(score + at, some, scaled);
        if (mask_kind == CHOICES || mask_kind == ADDENDS || some == 0xffff)
            highest = _mm512_mask_mov_ps(highest, some, maximum(highest, scaled));
        else
            for (long i = at; i < count; i++) top = top < score[i] ? score[i] : top;
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
    const __mmask16 is_small = _mm512_cmp_ps_mask(value, _mm512_set1_ps(smallest), _CMP_LT_OS);
    const __mmask16 is_large = _mm512_cmp_ps_mask(value, _mm512_set1_ps(largest), _CMP_GT_OS);
    result = _mm512_mask_mov_epi32(result, is_small, _mm512_setzero_si512());
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(result, is_large, _mm512_set1_epi32(0x7f800000)));
}

// Replace scores by weights, rounded to the dtype but stored as float32; return the sum of what they were before.
INLINE float weigh_scores(const struct attention *a, const int dtype, float *scores, long count, float highest) {
    const long whole = count & ~15l;
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};  // of every other 16
    for (long at = 0; at < whole; at += 16) {
        const __m512 weights = approximate_exp(_mm512_sub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(highest)));
        sums[at / 16 % 2] = _mm512_add_ps(sums[at / 16 % 2], weights);
        _mm512_storeu_ps(scores + at, widen(dtype, narrow(dtype, weights)));
    }
    __m512 both = _mm512_add_ps(sums[0], sums[1]);
    REDUCE(_mm512_add_ps, both)
    float sum = _mm512_cvtss_f32(both);
    for (long at = whole; at < count; at++) {
        const float weight = (float)a->exponential(scores[at] - highest);
        sum += weight;
        scores[at] = _mm512_cvtss_f32(widen(dtype, narrow(dtype, _mm512_set1_ps(weight))));
    }
    return sum;
}

// Return how many dimensions lie before a multiple of 16 bytes in torch's buffer for the product of this number: these are apart.
// Each of its threads has a buffer, with scores, two more numbers for each query, and results; one follows the other.
INLINE long first_dims(const struct attention *a, long tokens, long product) {
    const long products = a->batch * a->heads * a->queries / a->together;
    const long thread = product / ((products + a->team.threads - 1) / a->team.threads);
    return -(thread + 1) * a->together * ((tokens < BLOCK ? tokens : BLOCK) + 2) & 3;
}

// Say whether all dimensions of some tokens are so small that no score, and no product with a zero, is NaN or infinite.
INLINE int are_moderate(const int dtype, const uint16_t *states, long stride, long count, long dim) {
    __m512i highest = _mm512_setzero_si512();
    for (long token = 0; token < count; token++)
        for (long at = 0; at < dim; at += 32) {
            const __m512i values = _mm512_maskz_loadu_epi16(dims_of(dim, at / 32), states + token * stride + at);
            highest = _mm512_max_epu16(highest, _mm512_and_si512(values, _mm512_set1_epi16(0x7fff)));
        }
    const short least = dtype == FLOAT16 ? 0x7c00 : (127 + LARGEST_POWER) << 7;
    return !_mm512_cmpge_epu16_mask(highest, _mm512_set1_epi16(least));
}

// Return how many tokens there are up to the last one that a mask does not hide from all of some queries: the others have no
// weight, and change nothing, if their keys and values are moderate. These are whole tiles, or all.
static long tokens_needed(const struct attention *a, const int dtype, const struct text *text, long batch, long key_head,
                          const long *head, const long *token, int rows, long *reach) {
    long tokens = text->tokens;
    if (a->mask_kind == CAUSAL) {  // torch goes as far as the block that the last of its queries ends in
        const long end = (token[0] / a->together + 1) * a->together, last_block = (end + BLOCK - 1) / BLOCK * BLOCK;
        if (last_block < tokens) tokens = last_block;
    } else if (a->mask_kind != CHOICES) {
        return tokens;
    }
    *reach = tokens;
    if ( !(a->scale <= LARGEST_SCALE && a->scale >= -LARGEST_SCALE)) return tokens;
    long last = tokens;  // the first of a tile
    if (a->mask_kind == CAUSAL && token[rows - 1] / TILE * TILE + TILE < last) last = token[rows - 1] / TILE * TILE + TILE;
    for (int seen = a->mask_kind == CAUSAL; !seen && last > 0;) {
        last = (last - 1) / TILE * TILE;
        const __mmask16 some = tokens - last >= TILE ? 0xffff : (__mmask16)((1u << (tokens - last)) - 1);
        for (int row = 0; row < rows && !seen; row++) {
            const uint8_t *mask = (const uint8_t *)a->mask + place(&a->of_mask, batch, head[row], token[row]) + last;
            const __m128i chosen = _mm_maskz_loadu_epi8(some, mask);
            seen = _mm_test_epi8_mask(chosen, chosen) != 0;
        }
        if (seen) last += TILE;
    }
    const long whole = tokens / TILE * TILE;
    if (last > whole || last == tokens) return tokens;
    const uint16_t *keys = text->keys + key_head * text->key_head + last * text->key_token;
    const uint16_t *values = text->values + key_head * text->value_head + last * text->value_token;
    int moderate = are_moderate(dtype, keys, text->key_token, tokens - last, a->dim) &&
                   are_moderate(dtype, values, text->value_token, tokens - last, a->dim);
    for (int row = 0; row < rows && moderate; row++)
        moderate = are_moderate(dtype, a->query + place(&a->of_query, batch, head[row], text->place + token[row]), 0, 1, a->dim);
    return moderate ? last : tokens;
}

// Compute attention of some queries that share keys and values, beginning with one of them; fetch what comes next.
INLINE void attend(const struct attention *a, const int dtype, const int order, long number, long key_head, long first_row,
                   int rows, const uint16_t *next_keys) {
    const struct text text = text_of(a, number);
    const long batch = a->texts ? 0 : number;
    const long dim = a->dim, blocks = (dim + 31) / 32;
    const long query_stride = 32 * blocks + 16;  // so that queries do not lie in the same places of the processor's memory
    float query[ROWS * (MAX_DIM + 16)];
    scores score[ROWS];  // then weights
    totals total[ROWS];
    dims apart[ROWS];
    float highest[ROWS], sum[ROWS];
    long head[ROWS], token[ROWS];
    for (int row = 0; row < rows; row++) {
        head[row] = key_head * a->group + (first_row + row) / a->queries;
        token[row] = (first_row + row) % a->queries;
        const uint16_t *from = a->query + place(&a->of_query, batch, head[row], text.place + token[row]);
        for (long block = 0; block < blocks; block++) {
            const __m512i all = _mm512_maskz_loadu_epi16(dims_of(dim, block), from + 32 * block);
            _mm512_storeu_ps(query + row * query_stride + 32 * block, widen(dtype, _mm512_castsi512_si256(all)));
            _mm512_storeu_ps(query + row * query_stride + 32 * block + 16, widen(dtype, _mm512_extracti64x4_epi64(all, 1)));
            total[row][block][0] = total[row][block][1] = _mm512_setzero_ps();
        }
        const long first = first_dims(a, text.tokens, ((batch * a->heads + head[row]) * a->queries + token[row]) / a->together);
        apart[row][0] = (__mmask16)((1u << (dtype == FLOAT16 ? first : (first + 1) / 2)) - 1);
        apart[row][1] = (__mmask16)((1u << (dtype == FLOAT16 ? 0 : first / 2)) - 1);
        highest[row] = -__builtin_inff();
        sum[row] = 0;
    }
    long reach = text.tokens;  // of torch's products
    const long all_needed = order == MANY ? tokens_needed(a, dtype, &text, batch, key_head, head, token, rows, &reach) : reach;
    for (long first = 0; first < all_needed; first += BLOCK) {
        const long count = text.tokens - first < BLOCK ? text.tokens - first : BLOCK;
        const long needed = all_needed - first < count ? all_needed - first : count;
        const uint16_t *keys = text.keys + key_head * text.key_head + first * text.key_token;
        const uint16_t *values = text.values + key_head * text.value_head + first * text.value_token;
        const uint16_t *following = text.tokens - first > BLOCK ? keys + BLOCK * text.key_token : next_keys;
        const struct ahead next_values = {values, text.value_token}, next = {following, text.key_token};
        // 1) scores of the block
        score_block(dtype, order, rows, keys, text.key_token, count, needed, dim, query, query_stride, score, next_values);
        // 2) weights; what was added up for lower scores shrinks
        for (int row = 0; row < rows; row++) {
            const long at = place(&a->of_mask, batch, head[row], token[row]) + first;
            const uint8_t *mask = (const uint8_t *)a->mask + (a->mask_kind == ADDENDS ? 2 * at : at);
            const float top = scale_scores(dtype, score[row], needed, (float)a->scale, mask, a->mask_kind, token[row] + 1 - first), before = highest[row];
            const float new_highest = before > top ? before : top;
            if (new_highest == -__builtin_inff()) {
                for (long i = 0; i < needed; i++) score[row][i] = 0;
                continue;
            }
            const float added = weigh_scores(a, dtype, score[row], needed, new_highest);
            const float shrink = a->exponential32(before - new_highest);
            sum[row] = __builtin_fmaf(shrink, sum[row], added);
            highest[row] = new_highest;
            for (long i = 0; first && i < 2 * blocks; i++)
                total[row][i / 2][i % 2] = _mm512_mul_ps(total[row][i / 2][i % 2], _mm512_set1_ps(shrink));
        }
        // 3) weighted values
        FOR_ROWS(rows, add_rows(dtype, order, NUMBER, values, text.value_token, dim, score + row, count, needed, apart + row,
                                total + row, next))
    }
    // 4) divide by the sum of weights
    const __m512 left_out = _mm512_set1_ps(all_needed < reach ? 0.0f : -0.0f);
    for (int row = 0; row < rows; row++) {
        if (sum[row] == 0) sum[row] = 1;
        const float top = highest[row] == -__builtin_inff() ? 0 : highest[row];
        if (a->logsums) a->logsums[(batch * a->heads + head[row]) * a->queries + token[row]] = top + a->logarithm(sum[row]);
        uint16_t *result = a->result + ((batch * a->queries + text.place + token[row]) * a->heads + head[row]) * dim;
        for (long block = 0; block < blocks; block++) {
            __m256i half[2];
            for (int i = 0; i < 2; i++) {
                if (order == MANY)  // of a -0, what follows without any weight makes 0
                    total[row][block][i] = _mm512_add_ps(total[row][block][i], left_out);
                half[i] = narrow(dtype, _mm512_mul_ps(total[row][block][i], _mm512_set1_ps(1 / sum[row])));
            }
            const __m512i first = _mm512_cvtepu16_epi32(half[0]), second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half[1]), 16);
            const __m512i both = dtype == FLOAT16 ? _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1)
                                                  : _mm512_or_si512(first, second);
            _mm512_mask_storeu_epi16(result + 32 * block, dims_of(dim, block), both);
        }
    }
}

typedef void attends(const struct attention *, long, long, long, int, const uint16_t *);

#define VARIANT(name, dtype, order)                                                                                       \
    static void name(const struct attention *a, long number, long key_head, long first, int rows, const uint16_t *next) { \
        attend(a, dtype, order, number, key_head, first, rows, next);                                                     \
    }
VARIANT(bfloat16_alone, BFLOAT16, ALONE)
VARIANT(bfloat16_few, BFLOAT16, FEW)
VARIANT(bfloat16_many, BFLOAT16, MANY)
VARIANT(float16_few, FLOAT16, FEW)
VARIANT(float16_many, FLOAT16, MANY)

static attends *const variants[][3] = {{bfloat16_alone, bfloat16_few, bfloat16_many}, {float16_few, float16_few, float16_many}};

// Return how many groups of heads there are, of all rows or texts.
static long groups_of(const struct attention *a) { return (a->texts ? a->num_texts : a->batch) * a->heads / a->group; }

// Return into how many parts the queries of a group are divided, so that no thread is idle.
static long parts_of(const struct attention *a) {
    if (a->mask_kind == CAUSAL) return 1;
    const long groups = groups_of(a), threads = a->team.threads;
    return groups % threads && groups < 4 * threads ? threads : 1;
}

// Write the new key and value of a text behind those that it has.
static void append(const struct attention *a, const struct text *text, long key_head) {
    const uint16_t *key = a->keys + place(&a->of_keys, 0, key_head, text->place);
    const uint16_t *value = a->values + place(&a->of_values, 0, key_head, text->place);
    const long last = text->tokens - 1;
    for (long at = 0; at < a->dim; at += 32) {
        const __mmask32 mask = dims_of(a->dim, at / 32);
        _mm512_mask_storeu_epi16(text->keys + key_head * text->key_head + last * text->key_token + at, mask,
                                 _mm512_maskz_loadu_epi16(mask, key + at));
        _mm512_mask_storeu_epi16(text->values + key_head * text->value_head + last * text->value_token + at, mask,
                                 _mm512_maskz_loadu_epi16(mask, value + at));
    }
}

static void attend_share(const void *attention, long from, long to) {
    const struct attention *a = attention;
    const long key_heads = a->heads / a->group, rows = a->group * a->queries, parts = parts_of(a);
    const int order = a->together == 1 ? ALONE : a->together < LANES ? FEW : MANY;
    for (long at = from; at < to; at++) {
        const long number = at / parts, end = (at % parts + 1) * rows / parts;
        if (a->texts && a->texts[number / key_heads].appends) append(a, &a->texts[number / key_heads], number % key_heads);
        int count;
        for (long row = at % parts * rows / parts; row < end; row += count) {
            const long next = end - row > ROWS || at + 1 == to ? number : (at + 1) / parts;
            const struct text text = text_of(a, next / key_heads);
            const long left = a->mask_kind == CAUSAL ? a->queries - row % a->queries : end - row;  // causal ones are of one head
            count = (int)(left < ROWS ? left : ROWS);
            variants[a->dtype][order](a, number / key_heads, number % key_heads, row, count,
                                      text.keys + next % key_heads * text.key_head);
        }
    }
}

// Compute attention, with as many threads as it says.
void attention(struct attention *a) { share_work(&a->team, attend_share, a, groups_of(a) * parts_of(a)); }
