// Kernels of ours for what torch does slowly in a step of a small model: low-rank products, the gate of an MLP, causal
// attention over short sequences, writing factors into slots, and rounding what a fold adds to a weight. Each does in
// one pass over its rows what torch does in several operators, computes in float32, and rounds a result once. No row's
// bits depend on the other rows of a call, or on the number of threads.
//
// `native.py` compiles this file and calls it; nothing here checks a size. A row's numbers lie next to each other; what
// is called a stride counts numbers from row to row. `bf16`: numbers are bfloat16, else float32.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "low_rank.h"

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
using Vec = float __attribute__((vector_size(4 * W)));
using Ints = int32_t __attribute__((vector_size(4 * W)));
using Bits = uint32_t __attribute__((vector_size(4 * W)));
using Half = uint16_t __attribute__((vector_size(2 * W)));

struct BF16 {
    uint16_t bits;
};

template <class To, class From>
To cast(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    memcpy(&to, &from, sizeof to);
    return to;
}

// --- numbers in memory to float32 and back ----------------------------------------------------------------------------

Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
Vec load(const BF16* p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return cast<Vec>(__builtin_convertvector(h, Bits) << 16);
}
void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
void store(BF16* p, Vec v) {
    const Bits bits = cast<Bits>(v);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    const Half h = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Half);
    memcpy(p, &h, sizeof h);
}
float load_one(const float* p) { return *p; }
float load_one(const BF16* p) { return cast<float>(uint32_t{p->bits} << 16); }
void store_one(float* p, float v) { *p = v; }
void store_one(BF16* p, float v) {
    const uint32_t bits = cast<uint32_t>(v);
    p->bits = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// The first n < W numbers at p; zeros after them.
template <class T>
Vec load_some(const T* p, int64_t n) {
    T row[W] = {};
    std::copy(p, p + n, row);
    return load(row);
}
template <class T>
void store_some(T* p, Vec v, int64_t n) {
    T row[W];
    store(row, v);
    std::copy(row, row + n, p);
}

float sum(Vec v) {
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

// e^x to 2 units in the last place, for x up to 88; below -87 as at -87. 2^n times a polynomial of the rest (Cephes).
Vec exp(Vec x) {
    x = x > 88.0f ? Vec{} + 88.0f : x;
    x = x < -87.0f ? Vec{} - 87.0f : x;
    const Vec magic = Vec{} + 12582912.0f;  // adding it rounds to an integer
    const Vec n = (x * 1.44269504f + magic) - magic;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = Vec{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    return p * cast<Vec>((__builtin_convertvector(n, Ints) + 127) << 23);
}

int64_t round_up(int64_t n) { return (n + W - 1) / W * W; }

// Forking costs some microseconds: fewer operations than this are one thread's work.
constexpr int64_t WORTH_FORKING = 1 << 15;

// Of n rows, those of this thread.
struct Share {
    int64_t start, stop;
    explicit Share(int64_t n)
        : start(n * omp_get_thread_num() / omp_get_num_threads()),
          stop(n * (omp_get_thread_num() + 1) / omp_get_num_threads()) {}
};

// --- gate -------------------------------------------------------------------------------------------------------------

// x (rows, 2 d) -> out (rows, d): act(first half) * second half.
template <class T>
void gate(const T* x, T* out, int64_t rows, int64_t d, bool gelu) {
    const auto act = [gelu](Vec a) {
        // GELU's approximation by tanh is a sigmoid too: 0.5 (1 + tanh u) = 1 / (1 + e^-2u).
        const Vec u = gelu ? 1.5957691216f * (a + 0.044715f * a * a * a) : a;
        return a / (1.0f + exp(-u));
    };
#pragma omp parallel for schedule(static) if (rows * d > WORTH_FORKING)
    for (int64_t row = 0; row < rows; row++) {
        const T *a = x + row * 2 * d, *b = a + d;
        T* o = out + row * d;
        int64_t i = 0;
        for (; i + W <= d; i += W) store(o + i, act(load(a + i)) * load(b + i));
        if (i < d) store_some(o + i, act(load_some(a + i, d - i)) * load_some(b + i, d - i), d - i);
    }
}

// --- low-rank products ------------------------------------------------------------------------------------------------

constexpr int64_t MAX_SCRATCH = 1 << 21;  // numbers: the factors of so many runs are widened at a time

// A run's factors in float32: first A (slices * rank, inputs), then of each slice the transposed B (rank, outputs).
int64_t widened_size(const Factors& f, const Run& run) {
    int64_t outputs = 0;
    for (int64_t s = 0; s < f.slices; s++) outputs += f.outputs[s];
    return rank_of(f, run) * (f.slices * f.inputs + outputs);
}

// Writes this thread's share of it.
template <class T>
void widen(const Factors& f, const Run& run, float* to) {
    const int64_t rank = rank_of(f, run);
    for (int64_t s = 0; s < f.slices; s++) {
        const T* a = static_cast<const T*>(f.a[s]) + run.slot * f.ranks * f.inputs;
        const Share share(rank * f.inputs);
        for (int64_t i = share.start; i < share.stop; i++) to[i] = load_one(a + i);
        to += rank * f.inputs;
    }
    for (int64_t s = 0; s < f.slices; s++) {
        const int64_t n = f.outputs[s];
        const T* b = static_cast<const T*>(f.b[s]) + run.slot * n * f.ranks;
        const Share share(n);
        for (int64_t r = 0; r < rank; r++)
            for (int64_t o = share.start; o < share.stop; o++) to[r * n + o] = load_one(b + o * f.ranks + r);
        to += rank * n;
    }
}

// Rows in float32. Those in bfloat16 are widened into `scratch`, without gaps, and the stride becomes theirs there.
const float* widen_rows(const float* x, int64_t&, int64_t, int64_t, float*) { return x; }
const float* widen_rows(const BF16* x, int64_t& stride, int64_t rows, int64_t n, float* scratch) {
    for (int64_t row = 0; row < rows; row++) {
        const BF16* from = x + row * stride;
        float* to = scratch + row * n;
        int64_t i = 0;
        for (; i + W <= n; i += W) store(to + i, load(from + i));
        for (; i < n; i++) to[i] = load_one(from + i);
    }
    stride = n;
    return scratch;
}

// scale x A^T of N rows and C columns. A sum has one order, whatever N and C are: of parts, so that no term is added to
// a sum of very many.
template <int N, int C>
void dots(const float* x, int64_t stride, const float* a, int64_t n, float scale, float* to, int64_t to_stride) {
    Vec sums[N][C] = {}, part[N][C];
    const auto add = [&](const auto& load_at, int64_t i) {
        Vec columns[C];
        for (int c = 0; c < C; c++) columns[c] = load_at(a + c * n + i);
        for (int row = 0; row < N; row++) {
            const Vec numbers = load_at(x + row * stride + i);
            for (int c = 0; c < C; c++) part[row][c] += numbers * columns[c];
        }
    };
    for (int64_t i = 0; i < n;) {
        for (auto& row : part)
            for (Vec& v : row) v = Vec{};
        const int64_t stop = std::min(n / W * W, i + 32 * W);
        if (i == stop) add([left = n - i](const float* p) { return load_some(p, left); }, i), i = n;
        for (; i < stop; i += W) add([](const float* p) { return load(p); }, i);
        for (int row = 0; row < N; row++)
            for (int c = 0; c < C; c++) sums[row][c] += part[row][c];
    }
    for (int row = 0; row < N; row++)
        for (int c = 0; c < C; c++) to[row * to_stride + c] = scale * sum(sums[row][c]);
}

// y (N, outputs) += shrunk (N, rank) B^T (rank, outputs)
template <int N, class T>
void expand(T* y, int64_t y_stride, const float* shrunk, int64_t shrunk_stride, const float* b, int64_t rank,
            int64_t outputs) {
    int64_t o = 0;
    for (; o + W <= outputs; o += W) {
        Vec sums[N];
        for (int row = 0; row < N; row++) sums[row] = load(y + row * y_stride + o);
        for (int64_t r = 0; r < rank; r++) {
            const Vec column = load(b + r * outputs + o);
            for (int row = 0; row < N; row++) sums[row] += shrunk[row * shrunk_stride + r] * column;
        }
        for (int row = 0; row < N; row++) store(y + row * y_stride + o, sums[row]);
    }
    for (; o < outputs; o++)
        for (int row = 0; row < N; row++) {
            float v = load_one(y + row * y_stride + o);
            for (int64_t r = 0; r < rank; r++)
                v = __builtin_fmaf(shrunk[row * shrunk_stride + r], b[r * outputs + o], v);
            store_one(y + row * y_stride + o, v);
        }
}

constexpr int ROWS = 4;  // computed at a time: they share what is loaded of the factors

// scale x A^T of N rows. A: (columns, n).
template <int N>
void shrink(const float* x, int64_t stride, const float* a, int64_t columns, int64_t n, float scale, float* to,
            int64_t to_stride) {
    constexpr int COLUMNS = 8 / N;  // sums in as many registers keep the multipliers busy
    int64_t j = 0;
    for (; j + COLUMNS <= columns; j += COLUMNS)
        dots<N, COLUMNS>(x, stride, a + j * n, n, scale, to + j, to_stride);
    for (; j + 2 <= columns; j += 2) dots<N, 2>(x, stride, a + j * n, n, scale, to + j, to_stride);
    if (j < columns) dots<N, 1>(x, stride, a + j * n, n, scale, to + j, to_stride);
}

// N rows. The scratch has room for them in float32, and for what they shrink to.
template <int N, class T>
void low_rank_rows(T* y, int64_t y_stride, const T* x, int64_t x_stride, const Factors& f, int64_t rank,
                   const float* widened, float scale, float* scratch) {
    const int64_t columns = f.slices * rank;
    float* shrunk = scratch + N * round_up(f.inputs);
    const float* rows = widen_rows(x, x_stride, N, f.inputs, scratch);
    shrink<N>(rows, x_stride, widened, columns, f.inputs, scale, shrunk, columns);
    const float* b = widened + columns * f.inputs;
    for (int64_t s = 0; s < f.slices; s++) {
        expand<N>(y, y_stride, shrunk + s * rank, columns, b, rank, f.outputs[s]);
        y += f.outputs[s];
        b += rank * f.outputs[s];
    }
}

// y += scale x A^T B^T for the rows of all runs, whose widened factors fit into `scratch`.
template <class T>
void low_rank_runs(T* y, int64_t y_stride, const T* x, int64_t x_stride, const Factors& f, const Run* runs, int64_t n,
                   float scale, float* scratch) {
    int64_t rows = 0, numbers = 0, ranks = 0;
    for (int64_t i = 0; i < n; i++) {
        rows += runs[i].stop - runs[i].start;
        numbers += widened_size(f, runs[i]);
        ranks = std::max(ranks, rank_of(f, runs[i]));
    }
#pragma omp parallel if (numbers + rows * numbers / n > WORTH_FORKING)
    {
        float* to = scratch;
        for (int64_t i = 0; i < n; to += widened_size(f, runs[i++])) widen<T>(f, runs[i], to);
#pragma omp barrier
        std::vector<float> row_scratch(ROWS * (round_up(f.inputs) + f.slices * ranks));
        const Share share(rows);
        int64_t first = 0;  // of the run's rows, among the rows of all runs
        const float* widened = scratch;
        for (int64_t i = 0; i < n; i++) {
            const int64_t count = runs[i].stop - runs[i].start;
            const int64_t from = std::max(share.start - first, int64_t{0}), to = std::min(share.stop - first, count);
            for (int64_t row = from, next; row < to; row = next) {
                next = row + ROWS <= to ? row + ROWS : row + 1;
                const auto some_rows = next == row + ROWS ? low_rank_rows<ROWS, T> : low_rank_rows<1, T>;
                some_rows(y + (runs[i].start + row) * y_stride, y_stride, x + (runs[i].start + row) * x_stride, x_stride,
                          f, rank_of(f, runs[i]), widened, scale, row_scratch.data());
            }
            first += count;
            widened += widened_size(f, runs[i]);
        }
    }
}

template <class T>
void low_rank(T* y, int64_t y_stride, const T* x, int64_t x_stride, const Factors& f, const Run* runs, int64_t n,
              float scale) {
    static std::vector<float> scratch;  // kept, because fresh memory costs page faults; one thread runs the model
    for (int64_t done = 0; done < n;) {
        int64_t take = 1, numbers = widened_size(f, runs[done]);
        while (done + take < n && numbers + widened_size(f, runs[done + take]) <= MAX_SCRATCH)
            numbers += widened_size(f, runs[done + take++]);
        if (static_cast<int64_t>(scratch.size()) < numbers) scratch.resize(numbers);
        low_rank_runs(y, y_stride, x, x_stride, f, runs + done, take, scale, scratch.data());
        done += take;
    }
}

// --- factors into slots -----------------------------------------------------------------------------------------------

}  // namespace

extern "C" {
// Where one module's factor lies in all slots, and its first number in the flat vector of all modules.
struct Piece {
    void* slots;
    int64_t slot_stride, feature_stride, rank_stride, features, offset;
};
}

namespace {

template <class T>
void write_slots(const float* flat, const Piece* pieces, int64_t n, int64_t slot, int64_t first, int64_t rank,
                 float factor) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const Piece& p = pieces[i];
        T* to = static_cast<T*>(p.slots) + slot * p.slot_stride + first * p.rank_stride;
        const float* from = flat + p.offset;
        for (int64_t f = 0; f < p.features; f++)
            for (int64_t r = 0; r < rank; r++)
                store_one(to + f * p.feature_stride + r * p.rank_stride, factor * from[f * rank + r]);
    }
}

// --- attention --------------------------------------------------------------------------------------------------------

constexpr int QUERIES = 8;  // computed at a time: as many sums keep the multipliers busy

}  // namespace

extern "C" {
struct Heads {
    int64_t heads, kv_heads, width;
    int64_t window;  // keys that a query sees, itself included; -1: all
    float scale;
};
// `count` sequences: places [starts[i], starts[i + 1]) of sequence i. rows[place]: its row of q, k and v. writes[place]:
// whether this place writes that row of the output; of the places with one row, one does.
struct Sequences {
    int64_t count;
    const int64_t *starts, *rows;
    const uint8_t* writes;
};
}

namespace {

// Scratch of one thread, for one sequence and one head of keys and values.
struct Block {
    int64_t keys, width;              // both rounded up to whole vectors
    std::vector<float> k, v, q, p, o;  // k (width, keys), v (keys, width), q (QUERIES, width), p (QUERIES, keys)

    template <class T>
    void fill(const T* key, int64_t k_stride, const T* value, int64_t v_stride, const int64_t* rows, int64_t n,
              int64_t d) {
        keys = round_up(n), width = round_up(d);
        k.assign(width * keys, 0.0f), v.assign(keys * width, 0.0f);
        q.assign(QUERIES * width, 0.0f), p.assign(QUERIES * keys, 0.0f), o.resize(width);
        for (int64_t j = 0; j < n; j++) {
            const T *a = key + rows[j] * k_stride, *b = value + rows[j] * v_stride;
            for (int64_t i = 0; i < d; i++) k[i * keys + j] = load_one(a + i);
            for (int64_t i = 0; i < d; i++) v[j * width + i] = load_one(b + i);
        }
    }

    // p = q k^T for keys [from, to), whole vectors.
    void score(int64_t from, int64_t to, int64_t d) {
        for (int64_t j = from; j < to; j += W) {
            Vec sums[QUERIES] = {};
            for (int64_t i = 0; i < d; i++) {
                const Vec column = load(&k[i * keys + j]);
                for (int r = 0; r < QUERIES; r++) sums[r] += q[r * width + i] * column;
            }
            for (int r = 0; r < QUERIES; r++) store(&p[r * keys + j], sums[r]);
        }
    }

    // Row r of p: the weights of keys [first, last], zero elsewhere in [from, to). Returns their sum.
    float weigh(int r, int64_t from, int64_t to, int64_t first, int64_t last, float scale) {
        float* row = &p[r * keys];
        const float top = *std::max_element(row + first, row + last + 1);
        Vec total = {};
        Ints number;
        for (int i = 0; i < W; i++) number[i] = i;
        for (int64_t j = from; j < to; j += W) {
            const Ints at = number + static_cast<int32_t>(j);
            const Vec e = exp((load(row + j) - top) * scale);
            const Vec weights = (at >= static_cast<int32_t>(first)) & (at <= static_cast<int32_t>(last)) ? e : Vec{};
            store(row + j, weights);
            total += weights;
        }
        return sum(total);
    }

    // The columns [i, i + W) of p v, keys [from, to).
    void mix(int64_t from, int64_t to, int64_t i, Vec* sums) {
        for (int r = 0; r < QUERIES; r++) sums[r] = Vec{};
        for (int64_t j = from; j < to; j++) {
            const Vec value = load(&v[j * width + i]);
            for (int r = 0; r < QUERIES; r++) sums[r] += p[r * keys + j] * value;
        }
    }
};

template <class T>
void attend_head(Block& b, const T* query, int64_t q_stride, T* out, const Sequences& s, int64_t start, int64_t n,
                 const Heads& h, int64_t head) {
    const int64_t d = h.width, out_stride = h.heads * d;
    for (int64_t first = 0; first < n; first += QUERIES) {
        const int64_t count = std::min<int64_t>(QUERIES, n - first);
        const uint8_t* writes = s.writes + start + first;
        if (std::none_of(writes, writes + count, [](uint8_t w) { return w; })) continue;
        const int64_t* rows = s.rows + start + first;
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < d; i++) b.q[r * b.width + i] = load_one(query + rows[r] * q_stride + head * d + i);
        const auto sees = [&](int64_t r) { return h.window < 0 ? 0 : std::max<int64_t>(0, first + r - h.window + 1); };
        const int64_t from = sees(0) / W * W, to = round_up(first + count);
        b.score(from, to, d);
        float totals[QUERIES];
        for (int64_t r = 0; r < count; r++) totals[r] = b.weigh(r, from, to, sees(r), first + r, h.scale);
        for (int64_t i = 0; i < d; i += W) {
            Vec sums[QUERIES];
            b.mix(from, to, i, sums);
            for (int64_t r = 0; r < count; r++)
                if (writes[r]) store_some(out + rows[r] * out_stride + head * d + i, sums[r] / totals[r], std::min<int64_t>(W, d - i));
        }
    }
}

template <class T>
void attend(const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v, int64_t v_stride, T* out,
            const Sequences& s, const Heads& h) {
    const int64_t group = h.heads / h.kv_heads, d = h.width;
#pragma omp parallel if (s.starts[s.count] * h.heads * d > WORTH_FORKING / 8)
    {
        static thread_local Block block;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < s.count; i++)
            for (int64_t kv = 0; kv < h.kv_heads; kv++) {
                const int64_t start = s.starts[i], n = s.starts[i + 1] - start;
                block.fill(k + kv * d, k_stride, v + kv * d, v_stride, s.rows + start, n, d);
                for (int64_t head = kv * group; head < (kv + 1) * group; head++)
                    attend_head(block, q, q_stride, out, s, start, n, h, head);
            }
    }
}

// --- stochastic rounding ----------------------------------------------------------------------------------------------

constexpr int COUNTERS = 16;  // drawn at a time
using Words = uint32_t __attribute__((vector_size(4 * COUNTERS)));
using Products = uint64_t __attribute__((vector_size(8 * COUNTERS)));

// The words of counters (block + 0..15, id), element by element: see vllm_zo/noise, whose integers these are.
void philox(uint64_t block, uint64_t id, uint64_t key, uint32_t* elements) {
    Products counter;
    for (int i = 0; i < COUNTERS; i++) counter[i] = block + i;
    Words c0 = __builtin_convertvector(counter, Words), c1 = __builtin_convertvector(counter >> 32, Words);
    Words c2 = Words{} + static_cast<uint32_t>(id), c3 = Words{} + static_cast<uint32_t>(id >> 32);
    uint32_t key0 = key, key1 = key >> 32;
    for (int round = 0; round < 10; round++, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
        const Products p0 = __builtin_convertvector(c0, Products) * 0xD2511F53u;
        const Products p1 = __builtin_convertvector(c2, Products) * 0xCD9E8D57u;
        c0 = __builtin_convertvector(p1 >> 32, Words) ^ c1 ^ key0, c1 = __builtin_convertvector(p1, Words);
        c2 = __builtin_convertvector(p0 >> 32, Words) ^ c3 ^ key1, c3 = __builtin_convertvector(p0, Words);
    }
    for (int i = 0; i < COUNTERS; i++)
        elements[4 * i] = c0[i], elements[4 * i + 1] = c1[i], elements[4 * i + 2] = c2[i], elements[4 * i + 3] = c3[i];
}

// Up or down, the nearer one likelier: `stochastic_round` of vllm_zo/methods/fold.py.
BF16 round_by(float value, uint32_t word) {
    constexpr float LARGEST = 3.3895314e38f;
    BF16 rounded;
    store_one(&rounded, value);
    const bool in_range = __builtin_fabsf(value) <= LARGEST;  // false for NaN
    rounded.bits = in_range ? (cast<uint32_t>(value) + (word & 0xffff)) >> 16 : rounded.bits;
    return rounded;
}

// One line: the elements first, first + 1, ... of a module.
void round_line(const float* value, BF16* out, int64_t length, uint64_t key, uint64_t id, uint64_t first) {
    uint32_t words[4 * COUNTERS];
    int64_t skip = first % 4;
    for (int64_t done = 0; done < length; skip = 0) {
        philox((first + done) / 4, id, key, words);
        const int64_t take = std::min(4 * COUNTERS - skip, length - done);
        for (int64_t i = 0; i < take; i++) out[done + i] = round_by(value[done + i], words[skip + i]);
        done += take;
    }
}

}  // namespace

extern "C" {

// (lines, length) float32 -> bfloat16. Element (o, i) is the module's number first + o stride + i.
void zo_round(const float* value, void* out, int64_t lines, int64_t length, uint64_t key, uint64_t id, uint64_t first,
              uint64_t stride) {
#pragma omp parallel for schedule(static) if (lines * length > WORTH_FORKING)
    for (int64_t line = 0; line < lines; line++)
        round_line(value + line * length, static_cast<BF16*>(out) + line * length, length, key, id,
                   first + line * stride);
}

int zo_threads() { return omp_get_max_threads(); }

void zo_gate(const void* x, void* out, int64_t rows, int64_t d, int gelu, int bf16) {
    if (bf16)
        gate(static_cast<const BF16*>(x), static_cast<BF16*>(out), rows, d, gelu);
    else
        gate(static_cast<const float*>(x), static_cast<float*>(out), rows, d, gelu);
}

void zo_low_rank(void* y, int64_t y_stride, const void* x, int64_t x_stride, const Factors* f, const Run* runs,
                 int64_t n, float scale, int bf16) {
    if (bf16)
        low_rank(static_cast<BF16*>(y), y_stride, static_cast<const BF16*>(x), x_stride, *f, runs, n, scale);
    else
        low_rank(static_cast<float*>(y), y_stride, static_cast<const float*>(x), x_stride, *f, runs, n, scale);
}

void zo_shrink(const float* x, int64_t x_stride, int64_t rows, const Factors* f, const Run* run, float* to) {
    const int64_t rank = rank_of(*f, *run), columns = f->slices * rank;
    for (int64_t row = 0, next; row < rows; row = next) {
        next = row + ROWS <= rows ? row + ROWS : row + 1;
        const auto some_rows = next == row + ROWS ? shrink<ROWS> : shrink<1>;
        for (int64_t s = 0; s < f->slices; s++) {
            const float* a = static_cast<const float*>(f->a[s]) + run->slot * f->ranks * f->inputs;
            some_rows(x + row * x_stride, x_stride, a, rank, f->inputs, 1.0f, to + row * columns + s * rank, columns);
        }
    }
}

// flat: (all features, rank), into the ranks [first, first + rank) of a slot.
void zo_write_slots(const float* flat, const Piece* pieces, int64_t n, int64_t slot, int64_t first, int64_t rank,
                    float factor, int bf16) {
    if (bf16)
        write_slots<BF16>(flat, pieces, n, slot, first, rank, factor);
    else
        write_slots<float>(flat, pieces, n, slot, first, rank, factor);
}

void zo_attend(const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
               void* out, const Sequences* s, const Heads* h, int bf16) {
    if (bf16)
        attend(static_cast<const BF16*>(q), q_stride, static_cast<const BF16*>(k), k_stride,
               static_cast<const BF16*>(v), v_stride, static_cast<BF16*>(out), *s, *h);
    else
        attend(static_cast<const float*>(q), q_stride, static_cast<const float*>(k), k_stride,
               static_cast<const float*>(v), v_stride, static_cast<float*>(out), *s, *h);
}
}
