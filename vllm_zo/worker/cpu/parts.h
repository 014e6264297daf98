// How the threads of tiles.cpp and panels.cpp share a product.

#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

// Of n things, shared out in multiples of `unit`, the first of part i of `parts`.
inline int64_t part_start(int64_t n, int64_t unit, int64_t i, int64_t parts) {
    return std::min(n, (n + unit - 1) / unit * i / parts * unit);
}

// A thread's part of a product: rows [start, stop), and [first, last) of what the outputs are split into. Threads share
// the rows, in multiples of `unit`; if a thread would get only a few, the outputs.
class Part {
    static constexpr int64_t ROWS_WORTH_SPLITTING = 128;
    int64_t unit, start, stop, first, last;

public:
    Part(int64_t rows, int64_t unit, int64_t columns) : unit(unit) {
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

    // Calls what(start, stop, first, last) for as many rows at a time as fit into `bytes`.
    template <class What>
    void in_turns(int64_t bytes_of_row, int64_t bytes, const What& what) const {
        const int64_t rows = stop - start, turns = ((rows + unit - 1) / unit * unit * bytes_of_row + bytes - 1) / bytes;
        for (int64_t turn = 0; turn < turns && first < last; turn++) {
            const int64_t from = start + part_start(rows, unit, turn, turns);
            const int64_t to = start + part_start(rows, unit, turn + 1, turns);
            if (from < to) what(from, to, first, last);
        }
    }
};
