// Low-rank products as native.cpp, tiles.cpp and panels.cpp are given them.

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
// y += scale x A^T B^T for the rows of n runs. bf16: numbers are bfloat16, else float32.
void zo_low_rank(void* y, int64_t y_stride, const void* x, int64_t x_stride, const Factors* f, const Run* runs, int64_t n,
                 float scale, int bf16);
// x A^T of `rows` rows of one run, float32, on this thread. to: (rows, slices * rank).
void zo_shrink(const float* x, int64_t x_stride, int64_t rows, const Factors* f, const Run* run, float* to);
}

inline int64_t rank_of(const Factors& f, const Run& run) { return run.rank < 0 ? f.ranks : run.rank; }
