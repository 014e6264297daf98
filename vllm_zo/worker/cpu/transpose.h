// What tiles.cpp and panels.cpp pack weights with.

#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

// The first n of 32 numbers of 16 bits; all, if n is larger.
__mmask32 some(int64_t n) { return n < 32 ? (1u << std::max(n, int64_t{0})) - 1 : ~0u; }

// Sixteen rows of 16 words -> 16 lines, each with a word of every row. A word is a float32 or two of bfloat16.
void transpose(__m512i (&rows)[16]) {
    __m512i mixed[16];
    for (int i = 0; i < 16; i += 2) {
        mixed[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        mixed[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            rows[i + 2 * k] = _mm512_unpacklo_epi64(mixed[i + k], mixed[i + k + 2]);
            rows[i + 2 * k + 1] = _mm512_unpackhi_epi64(mixed[i + k], mixed[i + k + 2]);
        }
    // rows[i + c], where 4 divides i, now has of the rows from i to i + 3 the words c, 4 + c, 8 + c and 12 + c.
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
        const __m512i even_below = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
        const __m512i odd_below = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even, even_below, 0x88);
        rows[4 + c] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
        rows[12 + c] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
    }
}

}  // namespace
