// Low-rank products as native.cpp, tiles.cpp and panels.cpp are given them, and how a product's work is shared out.

#pragma once
#include <omp.h>

#include <algorithm>
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

// Of n things, shared out in multiples of `unit`, the first of part i of `parts`.
inline int64_t part_start(int64_t n, int64_t unit, int64_t i, int64_t parts) {
    return std::min(n, (n + unit - 1) / unit * i / parts * unit);
}

// A thread's part of a product: rows [start, stop), and [first, last) of what the outputs are split into. Threads share
// the rows; if a thread would get only a few, the outputs.
struct Part {
    static constexpr int64_t ROWS_WORTH_SPLITTING = 128;
    int64_t start, stop, first, last;

    Part(int64_t rows, int64_t unit, int64_t columns) {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t row_parts = 1;
        for (int64_t parts = 2; parts <= threads; parts++)
            if (threads % parts == 0 && rows >= parts * ROWS_WORTH_SPLITTING) row_parts = parts;
        const int64_t column_parts = threads / row_parts;
        start = part_start(rows, unit, thread / column_parts, row_parts);
        stop = part_start(rows, unit, thread / column_parts + 1, row_parts);
        first = part_start(columns, 1, thread % column_parts, column_parts);
        last = part_start(columns, 1, thread % column_parts + 1, column_parts);
    }
};
