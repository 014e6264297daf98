// x W^T + x A^T B^T with the matrix tiles of AMX, for a bfloat16 weight that is packed once and adapters' factors.
//
// oneDNN gives all of a product to one thread at some row counts (426 rows of 768 to 768, for one), and builds a kernel
// for each row count it meets. Here the rows, or for a few rows the outputs, are split evenly among the threads, and a
// row count costs nothing.
//
// A block is 32 rows by 32 outputs: four tiles of sums, and in turn two of x and two of W, 32 inputs deep. A row of a
// tile is 64 bytes. Of a block's sums nothing waits: they are rounded while the next block is multiplied. To an
// adapter's rows A is a few outputs more of the layer. What they come to, x A^T, is inputs more, with B as weights.

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "low_rank.h"
#include "parts.h"
#include "tile_packing.h"

namespace {

constexpr int64_t PACKED_X = 768 << 10;      // bytes: what stays in a core's own cache beside a panel of W
constexpr int64_t PACKED_FACTORS = 8 << 20;  // bytes: of all runs' factors

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
    Number* of(int64_t numbers) {
        if (numbers > size) {
            free(memory);
            size = (numbers + 2047) / 2048 * 2048;
            memory = static_cast<Number*>(aligned_alloc(4096, size * sizeof(Number)));
        }
        return memory;
    }
    ~Scratch() { free(memory); }
};

// --- blocks -----------------------------------------------------------------------------------------------------------

// The sums of a block, and where they go.
struct Block {
    alignas(64) float sums[BLOCK * BLOCK];
    Number* out;
    int64_t stride, rows, columns;
    __m512 bias[2];
    int64_t done;  // rows

    void round(int64_t count) {
        for (const int64_t stop = std::min(rows, done + count); done < stop; done++) {
            const __m512 low = _mm512_load_ps(sums + done * BLOCK) + bias[0];
            const __m512 high = _mm512_load_ps(sums + done * BLOCK + 16) + bias[1];
            _mm512_mask_storeu_epi16(out + done * stride, some(columns), (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
};

// A run's factors, packed.
struct PackedRun {
    int64_t start, stop;  // its rows
    int64_t steps;        // of 16 ranks: tiles of a slice
    Number *a, *b;        // a: panels of shrunk numbers, as those of W. b: for each panel of W, `steps` deep
    bool finite;          // B is; zeros times infinity would reach the other rows of a block
};

// The shrunk rows of a block, for each slice; zeros where a row is not the run's.
struct Addend {
    const PackedRun* run;
    Number* shrunk;
};

// Multiplies 32 inputs. ROWS: tiles of rows.
template <int ROWS>
void step(const Number* x, const Number* w) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (ROWS == 2) {
        _tile_loadd(5, x + TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// For the next step, which loads tiles from memory: gcc does not know that it does.
void written() { asm volatile("" : : : "memory"); }

void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

template <int ROWS>
void store(float* sums) {
    _tile_stored(0, sums, 4 * BLOCK);
    _tile_stored(1, sums + 16, 4 * BLOCK);
    if (ROWS == 2) {
        _tile_stored(2, sums + 16 * BLOCK, 4 * BLOCK);
        _tile_stored(3, sums + 16 * BLOCK + 16, 4 * BLOCK);
    }
}

// Where a panel of W is, and the slice of the low-rank part to which it belongs.
struct Panel {
    int64_t index, slice;
    const Number* w;
};

// The sums of one block: its rows are packed in x, `depth` steps. Meanwhile `before` is rounded, and `ahead`, the panel
// to come, and what the block will write are fetched.
template <int ROWS>
void multiply(const Number* x, const Panel& panel, int64_t depth, const std::vector<Addend>& addends, Block& to,
              Block& before, const char*& ahead, int64_t lines) {
    const int64_t share = (before.rows + depth - 1) / depth, fetches = (to.rows + depth - 1) / depth;
    clear();
    for (int64_t k = 0; k < depth; k++) {
        for (int64_t i = 0; i < lines; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        for (int64_t i = k * fetches; i < std::min(to.rows, (k + 1) * fetches); i++)
            __builtin_prefetch(to.out + i * to.stride, 1);
        step<ROWS>(x + k * DEPTH, panel.w + k * DEPTH);
        before.round(share);
    }
    for (const auto& [run, shrunk] : addends)
        for (int64_t k = 0; k < run->steps; k++)
            step<ROWS>(shrunk + (panel.slice * run->steps + k) * DEPTH, run->b + (panel.index * run->steps + k) * DEPTH);
    store<ROWS>(to.sums);
}

// x A^T of the rows [start, stop) of a block. to: for each 16 of its columns, (32 rows, 16 pairs).
template <int ROWS>
void shrink(const Number* x, const Number* a, int64_t depth, int64_t columns, int64_t start, int64_t stop, Number* to) {
    alignas(64) float sums[BLOCK * BLOCK];
    for (int64_t first = 0; first < columns; first += BLOCK, a += depth * DEPTH) {
        clear();
        for (int64_t k = 0; k < depth; k++) step<ROWS>(x + k * DEPTH, a + k * DEPTH);
        store<ROWS>(sums);
        for (int64_t c = first; c < std::min(columns, first + BLOCK); c += 16, to += DEPTH)
            for (int64_t row = 0; row < 16 * ROWS; row++) {
                const bool of_run = start <= row && row < stop;
                const __m512i pairs = of_run ? halves(_mm512_load_ps(sums + row * BLOCK + c % BLOCK)) : __m512i{};
                _mm512_store_si512(to + row * 32, pairs);
            }
    }
}

// --- products ---------------------------------------------------------------------------------------------------------

// The slice of the low-rank part that has an output; the output becomes its place there.
int64_t slice_of(const Factors& f, int64_t& output) {
    int64_t slice = 0;
    for (; output >= f.outputs[slice]; slice++) output -= f.outputs[slice];
    return slice;
}

struct Product {
    const Number *x, *w, *bias;
    Number* out;
    int64_t x_stride, out_stride, inputs, outputs;
    const Factors* factors;
    std::vector<PackedRun>& runs;

    Panel panel(int64_t index) const {
        int64_t start = index * BLOCK;
        return {index, runs.empty() ? 0 : slice_of(*factors, start), w + index * blocks(inputs) * DEPTH};
    }

    // This thread's share of a run's factors.
    void pack(const Run& run, PackedRun& to) const {
        const Factors& f = *factors;
        const int64_t rank = rank_of(f, run), depth = blocks(inputs);
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < depth; k++)
            for (int64_t t = 0; t < f.slices * to.steps; t++) {
                const int64_t first = t % to.steps * 16;
                const auto a = static_cast<const Number*>(f.a[t / to.steps]) + (run.slot * f.ranks + first) * inputs;
                pack_weight(a + k * 32, rank - first, inputs - k * 32, inputs, tile_of(to.a, t, depth, k));
            }
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < outputs / 16; n++) {
            int64_t output = n * 16;
            const int64_t slice = slice_of(f, output);
            const auto b = static_cast<const Number*>(f.b[slice]) + (run.slot * f.outputs[slice] + output) * f.ranks;
            for (int64_t k = 0; k < to.steps; k++) {
                if (pack_b(b + k * 16, rank - k * 16, f.ranks, tile_of(to.b, n, to.steps, k))) continue;
#pragma omp atomic write
                to.finite = false;
            }
        }
    }

    // Numbers that the shrunk rows of a block take.
    int64_t shrunk_size(const PackedRun& run) const { return factors->slices * run.steps * DEPTH; }

    // What the runs add to a block, which has `rows` rows from `start` on. Shrunk rows go to `memory`, and move it on.
    void shrink_block(const Number* packed, int64_t start, int64_t rows, Number*& memory, std::vector<Addend>& to) const {
        to.clear();
        for (const PackedRun& run : runs) {
            if (run.stop <= start || start + rows <= run.start || !run.steps || !run.finite) continue;
            const auto of_rows = rows > 16 ? shrink<2> : shrink<1>;
            of_rows(packed, run.a, blocks(inputs), factors->slices * run.steps * 16, run.start - start, run.stop - start,
                    memory);
            to.push_back({&run, memory});
            memory += shrunk_size(run);
        }
    }

    // Rows [start, stop), whose packed x fits into a core's cache, of the panels [first, last) of outputs.
    void part(int64_t start, int64_t stop, int64_t first, int64_t last) const {
        static thread_local Scratch scratch;
        static thread_local Block sums[2];
        static thread_local std::vector<std::vector<Addend>> addends;
        const int64_t depth = blocks(inputs), row_blocks = blocks(stop - start);
        int64_t shrunk = 0;
        for (const PackedRun& run : runs)
            shrunk += std::min(row_blocks, blocks(run.stop - run.start) + 1) * shrunk_size(run);
        Number *packed = scratch.of(row_blocks * depth * DEPTH + shrunk), *memory = packed + row_blocks * depth * DEPTH;
        pack_rows(x, x_stride, start, stop, inputs, packed);
        written();
        if (addends.size() < static_cast<size_t>(row_blocks)) addends.resize(row_blocks);
        for (int64_t m = 0; m < row_blocks; m++)
            shrink_block(packed + m * depth * DEPTH, start + m * BLOCK, std::min(BLOCK, stop - start - m * BLOCK), memory,
                         addends[m]);
        written();

        const int64_t lines = (2 * 16 + row_blocks - 1) / row_blocks;
        sums[0].rows = sums[1].rows = 0;
        int now = 0;
        for (int64_t n = first; n < last; n++) {
            const Panel here = panel(n);
            auto ahead = reinterpret_cast<const char*>(here.w + depth * DEPTH);
            const __m512 low = widened(bias, outputs, n * BLOCK), high = widened(bias, outputs, n * BLOCK + 16);
            for (int64_t m = 0; m < row_blocks; m++, now ^= 1) {
                const int64_t row = start + m * BLOCK, rows = std::min(BLOCK, stop - row);
                Block& to = sums[now];
                to.out = out + row * out_stride + n * BLOCK, to.stride = out_stride, to.rows = rows, to.done = 0;
                to.columns = outputs - n * BLOCK, to.bias[0] = low, to.bias[1] = high;
                const auto of_rows = rows > 16 ? multiply<2> : multiply<1>;
                of_rows(packed + m * depth * DEPTH, here, depth, addends[m], to, sums[now ^ 1], ahead, lines);
            }
        }
        sums[now ^ 1].round(BLOCK);
    }
};

void multiply_all(const Product& product, int64_t rows, const Run* runs, int64_t n) {
#pragma omp parallel
    {
        if (!product.runs.empty()) {
            for (int64_t i = 0; i < n; i++) product.pack(runs[i], product.runs[i]);
#pragma omp barrier
        }
        const Tiles tiles;
        Part(rows, BLOCK, blocks(product.outputs))
            .in_turns(blocks(product.inputs) * 64, PACKED_X, [&](auto... of) { product.part(of...); });
    }
}

// Where the runs' factors are to be packed, in memory that lives until the next call. Empty: they cannot be.
void place(const Factors& f, const Run* runs, int64_t n, int64_t outputs, std::vector<PackedRun>& to) {
    static Scratch scratch;
    const auto is_odd = [](int64_t slice) { return slice % BLOCK != 0; };
    if (std::any_of(f.outputs, f.outputs + f.slices, is_odd)) return;
    if (std::accumulate(f.outputs, f.outputs + f.slices, int64_t{0}) != outputs) return;
    const auto steps = [&](const Run& run) { return (rank_of(f, run) + 15) / 16; };
    const auto size_a = [&](const Run& run) { return (f.slices * steps(run) + 1) / 2 * blocks(f.inputs) * DEPTH; };
    const auto size_b = [&](const Run& run) { return blocks(outputs) * steps(run) * DEPTH; };
    int64_t numbers = 0;
    for (const Run* run = runs; run < runs + n; run++) numbers += size_a(*run) + size_b(*run);
    if (numbers * static_cast<int64_t>(sizeof(Number)) > PACKED_FACTORS) return;
    Number* memory = scratch.of(numbers);
    for (const Run* run = runs; run < runs + n; memory += size_a(*run) + size_b(*run), run++)
        to.push_back({run->start, run->stop, steps(*run), memory, memory + size_a(*run), true});
}

}  // namespace

extern "C" {

// w (outputs, inputs) -> (blocks of outputs, blocks of inputs, 2, 16, 16, 2). A tile: 16 pairs of inputs by 16 outputs.
void zo_pack_tiles(const Number* w, Number* packed, int64_t outputs, int64_t inputs) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < 2 * blocks(outputs); n++)
        for (int64_t k = 0; k < blocks(inputs); k++)
            pack_weight(w + n * 16 * inputs + k * 32, outputs - n * 16, inputs - k * 32, inputs,
                        tile_of(packed, n, blocks(inputs), k));
}

// And back.
void zo_unpack_tiles(const Number* packed, Number* w, int64_t outputs, int64_t inputs) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < 2 * blocks(outputs); n++)
        for (int64_t k = 0; k < blocks(inputs); k++)
            unpack_weight(tile_of(packed, n, blocks(inputs), k), outputs - n * 16, inputs - k * 32, inputs,
                          w + n * 16 * inputs + k * 32);
}

// out = x W^T + bias, if there is one, + x A^T B^T for the rows of the n runs. w: as zo_pack_tiles writes it. Sums
// in float32, rounded once; twice where slices do not end with blocks of outputs, or the factors are too many, or B is
// not finite.
void zo_tile_product(const Number* x, int64_t x_stride, const Number* w, const Number* bias, Number* out,
                     int64_t out_stride, int64_t rows, int64_t inputs, int64_t outputs, const Factors* f,
                     const Run* runs, int64_t n) {
    static std::vector<PackedRun> packed;
    packed.clear();
    if (n) place(*f, runs, n, outputs, packed);
    multiply_all({x, w, bias, out, x_stride, out_stride, inputs, outputs, f, packed}, rows, runs, n);
    if (packed.empty() && n) zo_low_rank(out, out_stride, x, x_stride, f, runs, n, 1.0f, 1);
    for (size_t i = 0; i < packed.size(); i++)
        if (!packed[i].finite) zo_low_rank(out, out_stride, x, x_stride, f, runs + i, 1, 1.0f, 1);
}
}
#endif
