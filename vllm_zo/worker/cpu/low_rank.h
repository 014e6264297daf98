// What native.cpp knows of low-rank products and tiles.cpp adds to a product of its own.

#pragma once
#include <cstdint>

constexpr int MAX_SLICES = 4;

extern "C" {
// Factors of one linear layer, for all slots. a[slice]: (slots, ranks, inputs), b[slice]: (slots, outputs[slice], ranks).
struct Factors {
    int64_t slices, inputs, ranks;
    int64_t outputs[MAX_SLICES];
    const void *a[MAX_SLICES], *b[MAX_SLICES];
};
// Rows [start, stop) use the first `rank` ranks of a slot; -1: all.
struct Run {
    int64_t start, stop, slot, rank;
};
}

// What is to be added to a row: of each slice, shrunk (rank) times b (rank, outputs), float32. The slices follow each
// other in both. Rank 0: nothing.
struct Addend {
    const float *shrunk, *b;
    int64_t rank;
};

// What `x A^T B^T` adds to each of the rows x, (rows, inputs) in bfloat16. It lives until the next low-rank product. Null
// where the factors of so many runs would take too much memory at a time.
const Addend* shrink(const uint16_t* x, int64_t stride, int64_t rows, const Factors& f, const Run* runs, int64_t n);

// y += scale x A^T B^T
extern "C" void zo_low_rank(void* y, int64_t y_stride, const void* x, int64_t x_stride, const Factors* f,
                            const Run* runs, int64_t n, float scale, int bf16);
