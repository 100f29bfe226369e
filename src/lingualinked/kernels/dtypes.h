// Eight values at a time in bfloat16, float16 or float32, computed in float32 and rounded as torch rounds them.
//
// It knows no kernel, and nothing of NaNs: whether there are any, and infinities, can be asked.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, FLOAT16, BFLOAT16 };  // dtypes

INLINE __m256 load(const int dtype, const void *from, long at) {
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)from + at);
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    if (dtype == FLOAT16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// Round to the dtype, half to even.
INLINE __m128i round_halves(const int dtype, __m256 values) {
    if (dtype == FLOAT16) return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff))), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

INLINE __m256 round_values(const int dtype, __m256 values) {
    if (dtype == FLOAT32) return values;
    const __m128i halves = round_halves(dtype, values);
    return load(dtype, &halves, 0);
}

INLINE void store(const int dtype, void *to, long at, __m256 values) {
    if (dtype == FLOAT32)
        _mm256_storeu_ps((float *)to + at, values);
    else
        _mm_storeu_si128((__m128i *)((uint16_t *)to + at), round_halves(dtype, values));
}

// Return the highest bits, without signs, of these and of other values.
INLINE __m256i highest_bits(__m256i highest, __m256 values) {
    return _mm256_max_epi32(highest, _mm256_and_si256(_mm256_castps_si256(values), _mm256_set1_epi32(0x7fffffff)));
}

// Say whether values with these highest bits are finite in a dtype, and round to finite ones.
INLINE int are_finite(const int dtype, __m256i highest) {
    const int largest = dtype == FLOAT32 ? 0x7f7fffff : dtype == FLOAT16 ? 0x477fe000 : 0x7f7f0000;
    const __m256i higher = _mm256_cmpgt_epi32(highest, _mm256_set1_epi32(largest));
    return _mm256_testz_si256(higher, higher);
}
