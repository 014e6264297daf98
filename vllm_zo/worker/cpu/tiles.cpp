// x W^T with the matrix tiles of AMX, for a bfloat16 weight that is packed once.
//
// oneDNN gives all of a product to one thread at some row counts (426 rows of 768 to 768, for one), and builds a kernel
// for each row count it meets. Here the rows, or for a few rows the outputs, are split evenly among the threads, and a
// row count costs nothing.
//
// A block is 32 rows by 32 outputs: four tiles of sums, and in turn two of x and two of W, 32 inputs deep. A row of a
// tile is 64 bytes. Of a block's sums nothing waits: they are rounded while the next block is multiplied.

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "low_rank.h"

namespace {

using Number = uint16_t;  // the bits of a bfloat16
constexpr int64_t BLOCK = 32;
constexpr int64_t DEPTH = 32 * BLOCK;         // numbers in a block's two tiles of x, or of W
constexpr int64_t PACKED_X = 768 << 10;       // bytes: what stays in a core's own cache beside a panel of W
constexpr int64_t ROWS_WORTH_SPLITTING = 128;  // of a thread; with fewer, threads share the outputs

int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

// All eight tiles as 16 rows of 64 bytes, on this thread, until the end of the scope. Then they are as they were:
// oneDNN's kernels may count on that.
class Tiles {
    struct alignas(64) Setup {
        uint8_t palette = 0, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    Setup before;

public:
    Tiles() {
        Setup setup;
        setup.palette = 1;
        for (int i = 0; i < 8; i++) setup.row_bytes[i] = 64, setup.rows[i] = 16;
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" : : "m"(setup));
    }
    ~Tiles() { asm volatile("ldtilecfg %0" : : "m"(before)); }
};

// Memory of one thread, kept between calls: fresh memory costs page faults. Tiles load faster from whole lines.
class Scratch {
    Number* memory = nullptr;
    int64_t size = 0;

public:
    Number* of(int64_t bytes) {
        if (bytes > size) {
            free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = static_cast<Number*>(aligned_alloc(4096, size));
        }
        return memory;
    }
    ~Scratch() { free(memory); }
};

// Rows [start, stop) of x to blocks of (2 tiles, 16 rows, 32 inputs), zeros beyond its rows and inputs.
void pack_rows(const Number* x, int64_t stride, int64_t start, int64_t stop, int64_t inputs, Number* to) {
    for (int64_t row = start; row < start + blocks(stop - start) * BLOCK; row++) {
        Number* line = to + (row - start) / BLOCK * blocks(inputs) * DEPTH + (row - start) % BLOCK * 32;
        for (int64_t i = 0; i < inputs; i += 32, line += DEPTH) {
            const int64_t left = row < stop ? std::min<int64_t>(32, inputs - i) : 0;
            const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
            _mm512_store_si512(line, _mm512_maskz_loadu_epi16(mask, x + row * stride + i));
        }
    }
}

// Thirty-two of a layer's outputs: how many there are, their bias, and where they lie in a slice of the low-rank part.
struct Columns {
    int64_t count;
    __m512 bias[2];
    int64_t slice, slice_start, offset, slice_outputs;  // the slice's first column; where the 32 lie in it; its columns
};

// The sums of a block, and where they go.
struct Block {
    alignas(64) float sums[BLOCK * BLOCK];
    Number* out;
    int64_t stride, rows;
    Columns columns;
    const Addend* addends;  // of its rows; null: nothing is added
    int64_t done;           // rows

    void round(int64_t count) {
        for (const int64_t stop = std::min(rows, done + count); done < stop; done++) {
            __m512 low = _mm512_load_ps(sums + done * BLOCK) + columns.bias[0];
            __m512 high = _mm512_load_ps(sums + done * BLOCK + 16) + columns.bias[1];
            if (addends) {
                const Addend& addend = addends[done];
                const float* shrunk = addend.shrunk + columns.slice * addend.rank;
                const float* b = addend.b + columns.slice_start * addend.rank + columns.offset;
                for (int64_t r = 0; r < addend.rank; r++, b += columns.slice_outputs) {
                    const __m512 weight = _mm512_set1_ps(shrunk[r]);
                    low = _mm512_fmadd_ps(weight, _mm512_loadu_ps(b), low);
                    high = _mm512_fmadd_ps(weight, _mm512_loadu_ps(b + 16), high);
                }
            }
            const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            const __mmask32 mask = columns.count == BLOCK ? ~0u : (1u << columns.count) - 1;
            _mm512_mask_storeu_epi16(out + done * stride, mask, rounded);
        }
    }
};

// Sixteen numbers of a vector of n, from `first` on, in float32; zeros beyond it.
__m512 widened(const Number* numbers, int64_t n, int64_t first) {
    if (!numbers || first >= n) return _mm512_setzero_ps();
    const int64_t left = std::min<int64_t>(16, n - first);
    const __m256i bits = _mm256_maskz_loadu_epi16(left == 16 ? 0xffff : (1u << left) - 1, numbers + first);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The sums of one block: x and w are its packed rows and its panel, `depth` steps of 32 inputs. A second tile of rows
// is left out where a block has one only. Meanwhile `before` is rounded and `ahead`, the panel to come, is fetched.
template <bool TWO>
void multiply(const Number* x, const Number* w, int64_t depth, Block& to, Block& before, const char*& ahead,
              int64_t lines) {
    const int64_t share = (before.rows + depth - 1) / depth, fetches = (to.rows + depth - 1) / depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k++, x += DEPTH, w += DEPTH) {
        for (int64_t i = 0; i < lines; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        for (int64_t i = k * fetches; i < std::min(to.rows, (k + 1) * fetches); i++)
            __builtin_prefetch(to.out + i * to.stride, 1);
        _tile_loadd(6, w, 64);
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + DEPTH / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, x + DEPTH / 2, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        before.round(share);
    }
    _tile_stored(0, to.sums, 4 * BLOCK);
    _tile_stored(1, to.sums + 16, 4 * BLOCK);
    if (TWO) {
        _tile_stored(2, to.sums + 16 * BLOCK, 4 * BLOCK);
        _tile_stored(3, to.sums + 16 * BLOCK + 16, 4 * BLOCK);
    }
}

struct Product {
    const Number *x, *w, *bias;
    Number* out;
    int64_t x_stride, out_stride, inputs, outputs;
    const Factors* factors;
    const Addend* addends;  // of all rows; null: nothing is added

    Columns columns_of(int64_t panel) const {
        const int64_t start = panel * BLOCK;
        Columns c{};
        c.count = std::min(BLOCK, outputs - start);
        c.bias[0] = widened(bias, outputs, start), c.bias[1] = widened(bias, outputs, start + 16);
        if (addends) {
            for (; start >= c.slice_start + factors->outputs[c.slice]; c.slice++)
                c.slice_start += factors->outputs[c.slice];
            c.offset = start - c.slice_start, c.slice_outputs = factors->outputs[c.slice];
        }
        return c;
    }

    // Rows [start, stop), whose packed x fits into `scratch`, of the panels [first, last) of outputs.
    void part(int64_t start, int64_t stop, int64_t first, int64_t last, Number* scratch) const {
        const int64_t depth = blocks(inputs), row_blocks = blocks(stop - start);
        const int64_t lines = (2 * 16 + row_blocks - 1) / row_blocks;
        static thread_local Block sums[2];
        sums[0].rows = sums[1].rows = 0;
        int now = 0;
        pack_rows(x, x_stride, start, stop, inputs, scratch);
        asm volatile("" : : : "memory");  // gcc does not know that a tile's load reads memory
        for (int64_t n = first; n < last; n++) {
            const Number* panel = w + n * depth * DEPTH;
            auto ahead = reinterpret_cast<const char*>(panel + depth * DEPTH);
            const Columns columns = columns_of(n);
            for (int64_t m = 0; m < row_blocks; m++, now ^= 1) {
                const int64_t row = start + m * BLOCK, rows = std::min(BLOCK, stop - row);
                Block &to = sums[now], &before = sums[now ^ 1];
                to.out = out + row * out_stride + n * BLOCK, to.stride = out_stride, to.rows = rows, to.done = 0;
                to.columns = columns, to.addends = addends ? addends + row : nullptr;
                const auto run = rows > 16 ? multiply<true> : multiply<false>;
                run(scratch + m * depth * DEPTH, panel, depth, to, before, ahead, lines);
            }
        }
        sums[now ^ 1].round(BLOCK);
    }
};

// Of n things, shared out in multiples of `unit`, the first of part i of `parts`.
int64_t part_start(int64_t n, int64_t unit, int64_t i, int64_t parts) {
    return std::min(n, (n + unit - 1) / unit * i / parts * unit);
}

void multiply_all(const Product& product, int64_t rows) {
#pragma omp parallel
    {
        const Tiles tiles;
        int64_t threads = omp_get_num_threads(), row_parts = 1;
        for (int64_t parts = 2; parts <= threads; parts++)
            if (threads % parts == 0 && rows >= parts * ROWS_WORTH_SPLITTING) row_parts = parts;
        const int64_t column_parts = threads / row_parts, thread = omp_get_thread_num();
        const int64_t start = part_start(rows, BLOCK, thread / column_parts, row_parts);
        const int64_t stop = part_start(rows, BLOCK, thread / column_parts + 1, row_parts);
        const int64_t first = part_start(blocks(product.outputs), 1, thread % column_parts, column_parts);
        const int64_t last = part_start(blocks(product.outputs), 1, thread % column_parts + 1, column_parts);
        const int64_t row_bytes = blocks(product.inputs) * 64;
        const int64_t turns = (blocks(stop - start) * BLOCK * row_bytes + PACKED_X - 1) / PACKED_X;
        static thread_local Scratch scratch;
        for (int64_t turn = 0; turn < turns && first < last; turn++) {
            const int64_t from = start + part_start(stop - start, BLOCK, turn, turns);
            const int64_t to = start + part_start(stop - start, BLOCK, turn + 1, turns);
            if (from < to) product.part(from, to, first, last, scratch.of(blocks(to - from) * BLOCK * row_bytes));
        }
    }
}

}  // namespace

extern "C" {

// w (outputs, inputs) -> (blocks of outputs, blocks of inputs, 2, 16, 16, 2). A tile: 16 pairs of inputs by 16 outputs.
void zo_pack_tiles(const Number* w, Number* packed, int64_t outputs, int64_t inputs) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < blocks(outputs); n++)
        for (int64_t k = 0; k < blocks(inputs); k++) {
            Number* to = packed + (n * blocks(inputs) + k) * DEPTH;
            const int64_t numbers = std::min(BLOCK, inputs - k * BLOCK);
            for (int64_t column = 0; column < BLOCK; column++) {
                Number row[BLOCK] = {};
                const int64_t output = n * BLOCK + column;
                const Number* from = w + output * inputs + k * BLOCK;
                if (output < outputs) std::copy(from, from + numbers, row);
                for (int64_t pair = 0; pair < 16; pair++)
                    memcpy(to + column / 16 * 512 + pair * 32 + column % 16 * 2, row + 2 * pair, 4);
            }
        }
}

// out = x W^T + bias, if there is one, + x A^T B^T for the rows of the n runs. w: as zo_pack_tiles writes it. Sums
// in float32, rounded once; twice where slices do not end with blocks of outputs, or the factors are too many.
void zo_tile_product(const Number* x, int64_t x_stride, const Number* w, const Number* bias, Number* out,
                     int64_t out_stride, int64_t rows, int64_t inputs, int64_t outputs, const Factors* f,
                     const Run* runs, int64_t n) {
    const Addend* addends = nullptr;
    const auto is_odd = [](int64_t slice) { return slice % BLOCK != 0; };
    if (n && std::none_of(f->outputs, f->outputs + f->slices, is_odd) &&
        std::accumulate(f->outputs, f->outputs + f->slices, int64_t{0}) == outputs)
        addends = shrink(x, x_stride, rows, *f, runs, n);
    multiply_all({x, w, bias, out, x_stride, out_stride, inputs, outputs, f, addends}, rows);
    if (n && !addends) zo_low_rank(out, out_stride, x, x_stride, f, runs, n, 1.0f, 1);
}
}
#endif
