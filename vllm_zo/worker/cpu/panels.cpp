// x W^T + x A^T B^T for a weight that is packed once and adapters' factors, with AVX-512: in float32, and in bfloat16 on
// CPUs that have its instructions and no AMX.
//
// oneDNN waits for the weights of each layer to come from memory, and an adapter's part is a pass of its own over all
// outputs. Here the next outputs' weights are fetched while those at hand are multiplied, and what B gives is added
// before a sum is stored.
//
// A panel has the weights of as many outputs as three vectors hold sums, input by input; in bfloat16 two inputs make a
// pair, whose products an instruction adds up. A block is a few rows by one panel, whose sums fill the registers. All
// rows of a part take their turn while a panel is in the core's own cache.

#ifdef __AVX512F__
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "low_rank.h"
#include "parts.h"
#include "transpose.h"

namespace {

constexpr int W = 16, ROWS = 8, VECTORS = 3, PANEL = VECTORS * W;
constexpr int64_t STEPS = 256;           // of a sum, before it goes to the sum of those before: rounding grows less
constexpr int64_t BYTES_OF_X = 1 << 20;  // of a part: what stays in a core's own cache beside a panel
using Vec = float __attribute__((vector_size(4 * W), aligned(4)));

// --- numbers of both types: a step takes DEEP inputs of a row and of each output ------------------------------------

struct Single {
    static constexpr int64_t DEEP = 1;
    using Number = float;
    using Inputs = float;

    static float inputs(const float* x) { return *x; }
    static float last_inputs(const float* x) { return *x; }
    static Vec add(Vec sum, float x, const float* w) { return sum + x * *reinterpret_cast<const Vec*>(w); }
    static float widen(float number) { return number; }
    static void store(float* to, Vec v) { memcpy(to, &v, sizeof v); }
    static void shrink(const float* x, int64_t x_stride, int64_t rows, const Factors* f, const Run* run, float* to) {
        zo_shrink(x, x_stride, rows, f, run, to);
    }
};

#ifdef __AVX512BF16__
struct Pair {
    static constexpr int64_t DEEP = 2;
    using Number = uint16_t;  // the bits of a bfloat16
    using Inputs = __m512bh;

    static Inputs inputs(const Number* x) {
        int32_t pair;
        memcpy(&pair, x, sizeof pair);
        return (Inputs)_mm512_set1_epi32(pair);
    }
    static Inputs last_inputs(const Number* x) { return (Inputs)_mm512_set1_epi32(*x); }  // of an odd number
    static Vec add(Vec sum, Inputs x, const Number* w) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, x, (__m512bh)_mm512_loadu_si512(w));
    }
    static float widen(Number number) {
        const uint32_t bits = uint32_t{number} << 16;
        float wide;
        memcpy(&wide, &bits, sizeof wide);
        return wide;
    }
    static void store(Number* to, Vec v) {
        const auto rounded = _mm512_cvtneps_pbh((__m512)v);
        memcpy(to, &rounded, sizeof rounded);
    }

    // N rows by C columns. A sum has one order, whatever N and C are.
    template <int N, int C>
    static void dots(const Number* x, int64_t x_stride, const Number* a, int64_t n, float* to, int64_t to_stride) {
        __m512 sums[N][C] = {};
        for (int64_t i = 0; i < n; i += 2 * W) {
            const __mmask32 here = some(n - i);
            __m512bh columns[C];
            for (int c = 0; c < C; c++) columns[c] = (__m512bh)_mm512_maskz_loadu_epi16(here, a + c * n + i);
            for (int row = 0; row < N; row++) {
                const auto numbers = (__m512bh)_mm512_maskz_loadu_epi16(here, x + row * x_stride + i);
                for (int c = 0; c < C; c++) sums[row][c] = _mm512_dpbf16_ps(sums[row][c], numbers, columns[c]);
            }
        }
        for (int row = 0; row < N; row++)
            for (int c = 0; c < C; c++) to[row * to_stride + c] = _mm512_reduce_add_ps(sums[row][c]);
    }
    template <int N>
    static void shrink_rows(const Number* x, int64_t x_stride, const Factors& f, const Run& run, float* to) {
        const int64_t rank = rank_of(f, run), columns = f.slices * rank;
        for (int64_t slice = 0; slice < f.slices; slice++) {
            const Number* a = static_cast<const Number*>(f.a[slice]) + run.slot * f.ranks * f.inputs;
            int64_t r = 0;
            for (; r + 2 <= rank; r += 2, to += 2) dots<N, 2>(x, x_stride, a + r * f.inputs, f.inputs, to, columns);
            if (r < rank) dots<N, 1>(x, x_stride, a + r * f.inputs, f.inputs, to++, columns);
        }
    }
    static void shrink(const Number* x, int64_t x_stride, int64_t rows, const Factors* f, const Run* run, float* to) {
        const int64_t columns = f->slices * rank_of(*f, *run);
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) shrink_rows<4>(x + row * x_stride, x_stride, *f, *run, to + row * columns);
        for (; row < rows; row++) shrink_rows<1>(x + row * x_stride, x_stride, *f, *run, to + row * columns);
    }
};
#endif

template <class T>
int64_t depth(int64_t inputs) {
    return (inputs + T::DEEP - 1) / T::DEEP;
}

// --- blocks -----------------------------------------------------------------------------------------------------------

int64_t panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// What an adapter adds to a row's outputs in a panel: shrunk (rank) times b (rank, PANEL).
struct Addend {
    int64_t rank = 0;
    const float *shrunk = nullptr, *b = nullptr;
};

// What is fetched meanwhile: `bytes` for each step.
struct Ahead {
    const char* line;
    int64_t bytes;
};

// N rows of x times a panel, plus the bias (PANEL) and the addends, to the first `columns` of each row of out.
template <class T, int N>
void multiply(const typename T::Number* x, int64_t x_stride, const typename T::Number* w, int64_t inputs,
              const float* bias, const Addend* addends, typename T::Number* out, int64_t out_stride, int64_t columns,
              Ahead& ahead) {
    Vec total[N][VECTORS], sums[N][VECTORS];
    for (int row = 0; row < N; row++) {
        memcpy(total[row], bias, sizeof total[row]);
        for (int v = 0; v < VECTORS; v++) __builtin_prefetch(out + row * out_stride + v * W, 1);
    }
    const auto step = [&](int64_t k, const auto& inputs_at) {
        const typename T::Number* weights = w + k * PANEL * T::DEEP;
        __builtin_prefetch(ahead.line, 0, 2);
        ahead.line += ahead.bytes;
        for (int row = 0; row < N; row++) {
            const typename T::Inputs of_row = inputs_at(x + row * x_stride + k * T::DEEP);
            for (int v = 0; v < VECTORS; v++) sums[row][v] = T::add(sums[row][v], of_row, weights + v * W * T::DEEP);
        }
    };
    const int64_t whole = inputs / T::DEEP;
    for (int64_t start = 0; start < depth<T>(inputs); start += STEPS) {
        memset(sums, 0, sizeof sums);
        const int64_t stop = std::min(whole, start + STEPS);
        for (int64_t k = start; k < stop; k++) step(k, T::inputs);
        if (stop < start + STEPS && whole < depth<T>(inputs)) step(whole, T::last_inputs);
        for (int row = 0; row < N; row++)
            for (int v = 0; v < VECTORS; v++) total[row][v] += sums[row][v];
    }
    for (int row = 0; row < N; row++, addends++) {
        for (int64_t r = 0; r < addends->rank; r++)
            for (int v = 0; v < VECTORS; v++)
                total[row][v] += addends->shrunk[r] * reinterpret_cast<const Vec*>(addends->b + r * PANEL)[v];
        typename T::Number rounded[PANEL];
        typename T::Number* to = columns == PANEL ? out + row * out_stride : rounded;
        for (int v = 0; v < VECTORS; v++) T::store(to + v * W, total[row][v]);
        if (columns < PANEL) std::copy(rounded, rounded + columns, out + row * out_stride);
    }
}

template <class T, int... N>
constexpr auto by_rows(std::integer_sequence<int, N...>) {
    return std::array{multiply<T, N + 1>...};
}
template <class T>
constexpr auto MULTIPLY = by_rows<T>(std::make_integer_sequence<int, ROWS>());

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

template <class T>
struct Product {
    using Number = typename T::Number;

    const Number *x, *w, *bias;
    Number* out;
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
            T::shrink(x + first * x_stride, x_stride, last - first, factors, &run, to);
            for (int64_t row = first; row < last; row++, to += factors->slices * rank_of(*factors, run))
                s.shrunk_of[row - start] = to;
        });
    }

    // B of one slice for a panel that begins at its output `from`, rank by rank; zeros for outputs of other slices.
    void pack_b(const Run& run, int64_t slice, int64_t from, float* to) const {
        const int64_t rank = rank_of(*factors, run), count = factors->outputs[slice];
        std::fill(to, to + rank * PANEL, 0.0f);
        const Number* b = static_cast<const Number*>(factors->b[slice]) + run.slot * count * factors->ranks;
        for (int64_t o = std::max(int64_t{0}, -from); o < std::min(int64_t{PANEL}, count - from); o++)
            for (int64_t r = 0; r < rank; r++) to[r * PANEL + o] = T::widen(b[(from + o) * factors->ranks + r]);
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
            const Number* panel = w + output * depth<T>(inputs) * T::DEEP;
            float of_panel[PANEL] = {};
            if (bias) std::transform(bias + output, bias + output + left, of_panel, T::widen);
            find_addends(start, stop, output, scratch);
            constexpr int64_t BYTES = PANEL * T::DEEP * sizeof(Number);  // of a panel, for each step
            Ahead ahead{reinterpret_cast<const char*>(panel) + BYTES * depth<T>(inputs), (BYTES + blocks - 1) / blocks};
            for (int64_t row = start; row < stop; row += ROWS)
                MULTIPLY<T>[std::min<int64_t>(ROWS, stop - row) - 1](
                    x + row * x_stride, x_stride, panel, inputs, of_panel, &scratch.addends[row - start],
                    out + row * out_stride + output, out_stride, left, ahead);
        }
    }
};

// --- packing ----------------------------------------------------------------------------------------------------------

// The inputs of 16 outputs for 16 steps: where they are in a weight, and in a packed one.
template <class T>
struct Square {
    int64_t output, step, outputs, inputs;

    int64_t steps() const { return std::min<int64_t>(W, depth<T>(inputs) - step); }
    int64_t in_weight(int64_t row) const { return (output + row) * inputs + step * T::DEEP; }
    int64_t in_panel(int64_t line) const {
        return ((output / PANEL * depth<T>(inputs) + step + line) * PANEL + output % PANEL) * T::DEEP;
    }
    // Which of a row's 32 numbers of 16 bits the weight has.
    __mmask32 has(int64_t row) const {
        return output + row < outputs ? some((inputs - step * T::DEEP) * sizeof(typename T::Number) / 2) : 0;
    }
};

template <class T, class What>
void each_square(int64_t outputs, int64_t inputs, const What& what) {
#pragma omp parallel for schedule(static)
    for (int64_t output = 0; output < panels(outputs) * PANEL; output += W)
        for (int64_t step = 0; step < depth<T>(inputs); step += W) what(Square<T>{output, step, outputs, inputs});
}

// w (outputs, inputs) -> (panels, steps, outputs of a panel, inputs of a step), zeros beyond what it has.
template <class T>
void pack(const typename T::Number* w, typename T::Number* packed, int64_t outputs, int64_t inputs) {
    each_square<T>(outputs, inputs, [&](const Square<T>& square) {
        __m512i rows[W];
        for (int64_t i = 0; i < W; i++) rows[i] = _mm512_maskz_loadu_epi16(square.has(i), w + square.in_weight(i));
        transpose(rows);
        for (int64_t i = 0; i < square.steps(); i++) _mm512_storeu_si512(packed + square.in_panel(i), rows[i]);
    });
}

// And back.
template <class T>
void unpack(const typename T::Number* packed, typename T::Number* w, int64_t outputs, int64_t inputs) {
    each_square<T>(outputs, inputs, [&](const Square<T>& square) {
        __m512i rows[W] = {};
        for (int64_t i = 0; i < square.steps(); i++) rows[i] = _mm512_loadu_si512(packed + square.in_panel(i));
        transpose(rows);
        for (int64_t i = 0; i < W; i++) _mm512_mask_storeu_epi16(w + square.in_weight(i), square.has(i), rows[i]);
    });
}

// --- a call -----------------------------------------------------------------------------------------------------------

// out = x W^T + bias, if there is one, + x A^T B^T for the rows of the n runs. w: as `pack` writes it.
template <class T>
void product(const typename T::Number* x, int64_t x_stride, const typename T::Number* w,
             const typename T::Number* bias, typename T::Number* out, int64_t out_stride, int64_t rows, int64_t inputs,
             int64_t outputs, const Factors* f, const Run* runs, int64_t n) {
    int64_t columns = 0;
    for (int64_t i = 0; i < n; i++) columns = std::max(columns, f->slices * rank_of(*f, runs[i]));
    const Product<T> product{x, w, bias, out, x_stride, out_stride, inputs, outputs, f, runs, n, columns};
#pragma omp parallel
    Part(rows, ROWS, panels(outputs))
        .in_turns(inputs * sizeof(*x), BYTES_OF_X, [&](auto... of) { product.part(of...); });
}

}  // namespace

extern "C" {

// In float32.
void zo_pack_panels(const float* w, float* packed, int64_t outputs, int64_t inputs) {
    pack<Single>(w, packed, outputs, inputs);
}

void zo_unpack_panels(const float* packed, float* w, int64_t outputs, int64_t inputs) {
    unpack<Single>(packed, w, outputs, inputs);
}

void zo_panel_product(const float* x, int64_t x_stride, const float* w, const float* bias, float* out,
                      int64_t out_stride, int64_t rows, int64_t inputs, int64_t outputs, const Factors* f,
                      const Run* runs, int64_t n) {
    product<Single>(x, x_stride, w, bias, out, out_stride, rows, inputs, outputs, f, runs, n);
}

#ifdef __AVX512BF16__
// In bfloat16.
void zo_pack_pairs(const uint16_t* w, uint16_t* packed, int64_t outputs, int64_t inputs) {
    pack<Pair>(w, packed, outputs, inputs);
}

void zo_unpack_pairs(const uint16_t* packed, uint16_t* w, int64_t outputs, int64_t inputs) {
    unpack<Pair>(packed, w, outputs, inputs);
}

void zo_pair_product(const uint16_t* x, int64_t x_stride, const uint16_t* w, const uint16_t* bias, uint16_t* out,
                     int64_t out_stride, int64_t rows, int64_t inputs, int64_t outputs, const Factors* f,
                     const Run* runs, int64_t n) {
    product<Pair>(x, x_stride, w, bias, out, out_stride, rows, inputs, outputs, f, runs, n);
}
#endif
}
#endif
