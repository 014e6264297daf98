// Rows and weights as tiles.cpp multiplies them: in tiles of 16 lines of 64 bytes, in which bfloat16 numbers that are
// multiplied with each other lie in pairs.

#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "transpose.h"

namespace {

using Number = uint16_t;  // the bits of a bfloat16
constexpr int64_t BLOCK = 32;        // rows, or outputs, and inputs that are multiplied at a time
constexpr int64_t TILE = 16 * 32;    // numbers
constexpr int64_t DEPTH = 2 * TILE;  // numbers in a block's two tiles of x, or of W

int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

// Tile k, of `depth`, of the n-th 16 outputs: two of those lie side by side, as a block has them.
template <class T>
T* tile_of(T* packed, int64_t n, int64_t depth, int64_t k) {
    return packed + (n / 2 * depth + k) * DEPTH + n % 2 * TILE;
}

// Rows [start, stop) of x to blocks of (2 tiles, 16 rows, 32 inputs), zeros beyond its rows and inputs.
void pack_rows(const Number* x, int64_t stride, int64_t start, int64_t stop, int64_t inputs, Number* to) {
    for (int64_t row = start; row < start + blocks(stop - start) * BLOCK; row++) {
        Number* line = to + (row - start) / BLOCK * blocks(inputs) * DEPTH + (row - start) % BLOCK * 32;
        for (int64_t i = 0; i < inputs; i += 32, line += DEPTH)
            _mm512_store_si512(line, _mm512_maskz_loadu_epi16(row < stop ? some(inputs - i) : 0, x + row * stride + i));
    }
}

void store_tile(__m512i (&rows)[16], Number* to) {
    transpose(rows);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + 32 * i, rows[i]);
}

// The first 16 outputs of a weight, and their first 32 inputs, to a tile; zeros beyond what it has.
void pack_weight(const Number* w, int64_t outputs, int64_t inputs, int64_t stride, Number* to) {
    __m512i rows[16];
    for (int64_t i = 0; i < 16; i++) rows[i] = _mm512_maskz_loadu_epi16(i < outputs ? some(inputs) : 0, w + i * stride);
    store_tile(rows, to);
}

// And back.
void unpack_weight(const Number* tile, int64_t outputs, int64_t inputs, int64_t stride, Number* to) {
    __m512i rows[16];
    for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(tile + 32 * i);
    transpose(rows);
    for (int64_t i = 0; i < std::min(outputs, int64_t{16}); i++)
        _mm512_mask_storeu_epi16(to + i * stride, some(inputs), rows[i]);
}

// As `pack_weight` for B, 16 outputs and 16 ranks, each rank as two inputs. Returns whether all of it is finite.
bool pack_b(const Number* b, int64_t ranks, int64_t stride, Number* to) {
    __m512i rows[16];
    const __m512i exponent = _mm512_set1_epi32(0x7f80);
    __mmask16 infinite = 0;
    for (int64_t i = 0; i < 16; i++) {
        const __m512i once = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some(ranks), b + i * stride));
        infinite |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(once, exponent), exponent);
        rows[i] = _mm512_or_si512(once, _mm512_slli_epi32(once, 16));
    }
    store_tile(rows, to);
    return !infinite;
}

// Sixteen numbers of a vector of n, from `start` on, in float32; zeros beyond it.
__m512 widened(const Number* numbers, int64_t n, int64_t start) {
    if (!numbers) return _mm512_setzero_ps();
    const __m256i bits = _mm256_maskz_loadu_epi16(some(n - start), numbers + start);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Sixteen numbers as two of bfloat16 each, the second being what the first leaves of it.
__m512i halves(__m512 numbers) {
    const __m512i first = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers)), 16);
    const auto second = (__m256i)_mm512_cvtneps_pbh(numbers - _mm512_castsi512_ps(first));
    return _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

}  // namespace
