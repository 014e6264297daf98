// x W^T + x A^T B^T for a float32 weight that is packed once and adapters' factors, with AVX-512.
//
// oneDNN waits for the weights of each layer to come from memory, and an adapter's part is a pass of its own over all
// outputs. Here the next outputs' weights are fetched while those at hand are multiplied, and what B gives is added
// before a sum is stored.
//
// A panel has the weights of as many outputs as three vectors hold, input by input. A block is a few rows by one panel,
// whose sums fill the registers. All rows of a part take their turn while a panel is in the core's own cache.

#ifdef __AVX512F__
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "low_rank.h"
#include "parts.h"

namespace {

constexpr int W = 16, ROWS = 8, VECTORS = 3, PANEL = VECTORS * W;
constexpr int64_t TERMS = 256;           // of a sum, before it goes to the sum of those before: rounding grows less
constexpr int64_t BYTES_OF_X = 1 << 20;  // of a part: what stays in a core's own cache beside a panel
using Vec = float __attribute__((vector_size(4 * W), aligned(4)));

int64_t panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// What an adapter adds to a row's outputs in a panel: shrunk (rank) times b (rank, PANEL).
struct Addend {
    int64_t rank = 0;
    const float *shrunk = nullptr, *b = nullptr;
};

// What is fetched meanwhile: `step` bytes for each input that is multiplied.
struct Ahead {
    const char* line;
    int64_t step;
};

// N rows of x times a panel, plus the bias (PANEL) and the addends, to the first `columns` of each row of out.
template <int N>
void multiply(const float* x, int64_t x_stride, const float* w, int64_t inputs, const float* bias,
              const Addend* addends, float* out, int64_t out_stride, int64_t columns, Ahead& ahead) {
    Vec total[N][VECTORS];
    for (int row = 0; row < N; row++) {
        memcpy(total[row], bias, sizeof total[row]);
        for (int v = 0; v < VECTORS; v++) __builtin_prefetch(out + row * out_stride + v * W, 1);
    }
    for (int64_t start = 0; start < inputs; start += TERMS) {
        Vec sums[N][VECTORS] = {};
        for (int64_t k = start; k < std::min(inputs, start + TERMS); k++) {
            const Vec* weights = reinterpret_cast<const Vec*>(w + k * PANEL);
            __builtin_prefetch(ahead.line, 0, 2);
            ahead.line += ahead.step;
            for (int row = 0; row < N; row++)
                for (int v = 0; v < VECTORS; v++) sums[row][v] += x[row * x_stride + k] * weights[v];
        }
        for (int row = 0; row < N; row++)
            for (int v = 0; v < VECTORS; v++) total[row][v] += sums[row][v];
    }
    for (int row = 0; row < N; row++, addends++) {
        for (int64_t r = 0; r < addends->rank; r++)
            for (int v = 0; v < VECTORS; v++)
                total[row][v] += addends->shrunk[r] * reinterpret_cast<const Vec*>(addends->b + r * PANEL)[v];
        if (columns == PANEL)
            memcpy(out + row * out_stride, total[row], sizeof total[row]);  // three stores instead of a call
        else
            memcpy(out + row * out_stride, total[row], columns * sizeof(float));
    }
}

template <int... N>
constexpr auto by_rows(std::integer_sequence<int, N...>) {
    return std::array{multiply<N + 1>...};
}
constexpr auto MULTIPLY = by_rows(std::make_integer_sequence<int, ROWS>());

// A thread's memory, kept between calls: fresh memory costs page faults.
struct Scratch {
    std::vector<float> shrunk, b;         // of each row (columns), of each run (columns, PANEL)
    std::vector<const float*> shrunk_of;  // of each row, if it is a run's
    std::vector<Addend> addends;          // to each row

    static float* of(std::vector<float>& numbers, int64_t size) {
        if (static_cast<int64_t>(numbers.size()) < size) numbers.resize(size);
        return numbers.data();
    }
};

struct Product {
    const float *x, *w, *bias;
    float* out;
    int64_t x_stride, out_stride, inputs, outputs;
    const Factors* factors;
    const Run* runs;
    int64_t n, columns;  // runs; the shrunk numbers of a row, at most

    // Calls `what(run, its first row, its last)` for the runs that have rows between start and stop.
    template <class What>
    void each_run(int64_t start, int64_t stop, const What& what) const {
        for (const Run* run = runs; run < runs + n; run++)
            if (const int64_t first = std::max(start, run->start), last = std::min(stop, run->stop); first < last)
                what(*run, first, last);
    }

    void shrink(int64_t start, int64_t stop, Scratch& s) const {
        s.shrunk_of.resize(stop - start);
        float* memory = Scratch::of(s.shrunk, (stop - start) * columns);
        each_run(start, stop, [&](const Run& run, int64_t first, int64_t last) {
            float* to = memory + (first - start) * columns;
            zo_shrink(x + first * x_stride, x_stride, last - first, factors, &run, to);
            for (int64_t row = first; row < last; row++, to += factors->slices * rank_of(*factors, run))
                s.shrunk_of[row - start] = to;
        });
    }

    // B of one slice for a panel that begins at its output `from`, rank by rank; zeros for outputs of other slices.
    void pack_b(const Run& run, int64_t slice, int64_t from, float* to) const {
        const int64_t rank = rank_of(*factors, run), count = factors->outputs[slice];
        std::fill(to, to + rank * PANEL, 0.0f);
        const float* b = static_cast<const float*>(factors->b[slice]) + run.slot * count * factors->ranks;
        for (int64_t o = std::max(int64_t{0}, -from); o < std::min(int64_t{PANEL}, count - from); o++)
            for (int64_t r = 0; r < rank; r++) to[r * PANEL + o] = b[(from + o) * factors->ranks + r];
    }

    // What goes to the rows in the panel that begins with `output`. It may have outputs of several slices, whose shrunk
    // numbers lie next to each other.
    void find_addends(int64_t start, int64_t stop, int64_t output, Scratch& s) const {
        s.addends.assign(stop - start, {});
        float* to = Scratch::of(s.b, n * columns * PANEL);
        each_run(start, stop, [&](const Run& run, int64_t first, int64_t last) {
            const int64_t rank = rank_of(*factors, run);
            const float* b = to;
            int64_t before = 0, ranks = 0, from = output;
            for (int64_t slice = 0; slice < factors->slices; from -= factors->outputs[slice++]) {
                if (from >= factors->outputs[slice]) before += rank;
                else if (from > -PANEL) pack_b(run, slice, from, to), to += rank * PANEL, ranks += rank;
            }
            for (int64_t row = first - start; row < last - start; row++)
                s.addends[row] = {ranks, s.shrunk_of[row] + before, b};
        });
    }

    // Rows [start, stop), of which x fits into a core's cache, of the panels [first, last).
    void part(int64_t start, int64_t stop, int64_t first, int64_t last) const {
        static thread_local Scratch scratch;
        shrink(start, stop, scratch);
        const int64_t blocks = (stop - start + ROWS - 1) / ROWS;
        for (int64_t n = first; n < last; n++) {
            const int64_t output = n * PANEL, left = std::min<int64_t>(PANEL, outputs - output);
            const float* panel = w + output * inputs;
            float of_panel[PANEL] = {};
            if (bias) std::copy(bias + output, bias + output + left, of_panel);
            find_addends(start, stop, output, scratch);
            Ahead ahead{reinterpret_cast<const char*>(panel + PANEL * inputs),
                        static_cast<int64_t>((PANEL * sizeof(float) + blocks - 1) / blocks)};
            for (int64_t row = start; row < stop; row += ROWS)
                MULTIPLY[std::min<int64_t>(ROWS, stop - row) - 1](
                    x + row * x_stride, x_stride, panel, inputs, of_panel, &scratch.addends[row - start],
                    out + row * out_stride + output, out_stride, left, ahead);
        }
    }
};

}  // namespace

extern "C" {

// w (outputs, inputs) -> (panels, inputs, outputs of a panel), zeros beyond the outputs.
void zo_pack_panels(const float* w, float* packed, int64_t outputs, int64_t inputs) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < panels(outputs); n++) {
        float* panel = packed + n * PANEL * inputs;
        for (int64_t o = n * PANEL; o < (n + 1) * PANEL; o++)
            for (int64_t k = 0; k < inputs; k++) panel[k * PANEL + o % PANEL] = o < outputs ? w[o * inputs + k] : 0.0f;
    }
}

// And back.
void zo_unpack_panels(const float* packed, float* w, int64_t outputs, int64_t inputs) {
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t k = 0; k < inputs; k++)
            w[o * inputs + k] = packed[o / PANEL * PANEL * inputs + k * PANEL + o % PANEL];
}

// out = x W^T + bias, if there is one, + x A^T B^T for the rows of the n runs. w: as zo_pack_panels writes it.
void zo_panel_product(const float* x, int64_t x_stride, const float* w, const float* bias, float* out,
                      int64_t out_stride, int64_t rows, int64_t inputs, int64_t outputs, const Factors* f,
                      const Run* runs, int64_t n) {
    int64_t columns = 0;
    for (int64_t i = 0; i < n; i++) columns = std::max(columns, f->slices * rank_of(*f, runs[i]));
    const Product product{x, w, bias, out, x_stride, out_stride, inputs, outputs, f, runs, n, columns};
#pragma omp parallel
    Part(rows, ROWS, panels(outputs))
        .in_turns(inputs * sizeof(float), BYTES_OF_X, [&](auto... of) { product.part(of...); });
}
}
#endif
