// RankDice and RankIoU on the CPU: the method of rankseg/solver.py and rankseg/nonoverlap.py, one row at a time.
//
// A row is one class of one image. It is finished while it is in the processor's cache:
//   1. check, maximum, sum and a sample, in one pass;  2. Dinkelbach's iteration on the sample, then one step on all;
//   3. power sums and the pixels of a bracket around the cut-off (the window), in one pass;  4. sort of the window,
//   the bounds g of rankseg/surrogate.py, and the quadrature of rankseg/exact.py;  5. the mask.
// If g does not prove that the best volume is in the bracket, the k pixels next to it are added; k follows from g.
// Equal pixels are kept as one run with a count, so that maps of exact zeros and ones cost no more than others.
//
// The interface is a plain C ABI: pointers, sizes and strides. Neither torch nor Python headers are needed.
// Floating-point contraction must be off (-ffp-contract=off): equal results with every instruction set.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

constexpr int64_t BLOCK = 2048;         // pixels that are processed together
constexpr int64_t PART = 512;           // pixels of a block that skip a step together, if none is large enough
constexpr int64_t CHUNK = 1 << 16;      // pixels of a long row that one thread takes; results do not depend on threads
constexpr int64_t LONG = 1 << 20;       // rows of at least so many pixels are shared by the threads
constexpr int64_t SHORT = 8192;         // rows of at most so many pixels are computed in double precision
constexpr int64_t SAMPLE = 4096;        // a longer row is sampled: about so many of its pixels
constexpr int64_t SHRINKS = 4;          // how often a bracket that holds too many pixels is narrowed
constexpr int MAX_NODES = 64;
constexpr int MAX_AXES = 16;
constexpr int ROUNDS = 20;              // of the search for non-overlapping masks
constexpr double MIN_GAIN = 1e-7;       // a round must raise the objective by this fraction
enum Status { OK = 0, BAD_VALUES = 1, NO_MEMORY = 2 };
enum DType { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2, FLOAT64 = 3 };

#define INLINE inline __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------- threads

// Threads that sleep on a condition variable between calls. The caller takes part, and waits only for workers that
// have started: a busy machine delays a call by no more than the work in progress.
class Pool {
    struct Job {
        const std::function<void(int64_t)>* body;
        int64_t count;
        int limit;
        int joined = 0, active = 0;
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
    };
    std::mutex busy, state;
    std::condition_variable wake, finished;
    Job* job = nullptr;
    int workers = 0;

    static void work(Job& job) {
        try {
            for (int64_t i; (i = job.next.fetch_add(1)) < job.count;) (*job.body)(i);
        } catch (...) {
            job.failed = true;
            job.next = job.count;
        }
    }
    void loop() {
        std::unique_lock<std::mutex> lock(state);
        for (;;) {
            wake.wait(lock, [&] { return job && job->joined < job->limit && job->next < job->count; });
            Job& mine = *job;
            ++mine.joined, ++mine.active;
            lock.unlock();
            work(mine);
            lock.lock();
            if (--mine.active == 0) finished.notify_all();
        }
    }

  public:
    void run(int64_t count, int threads, const std::function<void(int64_t)>& body) {
        std::unique_lock<std::mutex> alone(busy, std::defer_lock);
        if (threads <= 1 || count <= 1 || !alone.try_lock()) {  // another caller has the workers: work alone
            for (int64_t i = 0; i < count; ++i) body(i);
            return;
        }
        Job mine;
        mine.body = &body, mine.count = count, mine.limit = int(std::min<int64_t>(threads, count)) - 1;
        {
            std::lock_guard<std::mutex> lock(state);
            try {
                for (; workers < mine.limit; ++workers) std::thread([this] { loop(); }).detach();
            } catch (const std::system_error&) {  // the system starts no more threads: fewer suffice
            }
            job = &mine;
        }
        wake.notify_all();
        work(mine);
        std::unique_lock<std::mutex> lock(state);
        job = nullptr;
        finished.wait(lock, [&] { return mine.active == 0; });
        if (mine.failed) throw std::bad_alloc();
    }
};

// Never deleted: sleeping threads refer to it. A forked child has none of the threads and starts its own.
Pool* pool = nullptr;

Pool& get_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    });
    return *pool;
}

// -------------------------------------------------------------------------------- loops over pixels

template <class F> struct IntOf;
template <> struct IntOf<float> { using type = int32_t; };
template <> struct IntOf<double> { using type = int64_t; };

template <class F, int B> struct Vec { typedef F type __attribute__((vector_size(B))); };

template <class V, class F> INLINE V load(const F* x) {
    V v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

// Add the lanes of a vector of floats, or of doubles, to vectors of doubles.
template <class F, int B> struct Wide {
    using X = typename Vec<F, B>::type;
    using D = typename Vec<double, B>::type;
    D part[sizeof(double) / sizeof(F)] = {};
    INLINE void add(X v) {
        if constexpr (sizeof(F) == 8) {
            part[0] += v;
        } else {
            using H = typename Vec<float, B / 2>::type;
            H half[2];
            std::memcpy(half, &v, sizeof v);
            part[0] += __builtin_convertvector(half[0], D);
            part[1] += __builtin_convertvector(half[1], D);
        }
    }
    INLINE double total() const {
        double sum = 0;
        for (const D& d : part)
            for (int j = 0; j < int(sizeof(D) / 8); ++j) sum += d[j];
        return sum;
    }
};

template <class V> INLINE int64_t count_of(V marks) {  // each lane is minus a count
    int64_t sum = 0;
    for (int j = 0; j < int(sizeof(V) / sizeof(marks[0])); ++j) sum -= marks[j];
    return sum;
}

struct Stats {
    double sum = 0, top = 0;
    bool bad = false;
};

template <class F, int B> INLINE void stats_body(const F* x, int64_t n, Stats& out) {
    using X = typename Vec<F, B>::type;
    using I = typename Vec<typename IntOf<F>::type, B>::type;
    constexpr int L = B / sizeof(F);
    X top = {};
    I good = ~I{};
    Wide<F, B> sum;
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        X v = load<X>(x + i);
        good &= (v >= F(0)) & (v <= F(1));
        top = v > top ? v : top;
        sum.add(v);
    }
    out.sum += sum.total();
    for (int j = 0; j < L; ++j) {
        out.top = std::max(out.top, double(top[j]));
        out.bad |= good[j] == 0;
    }
    for (; i < n; ++i) {
        out.bad |= !(x[i] >= F(0) && x[i] <= F(1));
        out.top = std::max(out.top, double(x[i]));
        out.sum += double(x[i]);
    }
}

// Σ max(p - cut, 0) and the number of pixels above `cut`, for guesses only.
struct Excess {
    double excess = 0;
    int64_t count = 0;
};

template <class F, int B> INLINE void excess_body(const F* x, int64_t n, F cut, Excess& out) {
    using X = typename Vec<F, B>::type;
    using I = typename Vec<typename IntOf<F>::type, B>::type;
    constexpr int L = B / sizeof(F);
    X sum = {};
    I count = {};
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        X v = load<X>(x + i) - cut;
        I above = v > F(0);
        count += above;
        sum += (X)((I)v & above);
    }
    out.count += count_of(count);
    double total = 0;
    for (int j = 0; j < L; ++j) total += double(sum[j]);
    for (; i < n; ++i)
        if (x[i] > cut) total += double(x[i] - cut), ++out.count;
    out.excess += total;
}

template <class F, int B> INLINE void largest_body(const F* x, int64_t n, F& out) {
    using X = typename Vec<F, B>::type;
    constexpr int L = B / sizeof(F);
    X top = {};
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        X v = load<X>(x + i);
        top = v > top ? v : top;
    }
    out = 0;
    for (int j = 0; j < L; ++j) out = std::max(out, top[j]);
    for (; i < n; ++i) out = std::max(out, x[i]);
}

// Add Σ p^k, k = 0..4, of the pixels above `cut` to `sums`; or, of those up to `cut`, k = 2..4 alone.
template <class F, int B, bool ABOVE> INLINE void add_powers(const F* x, int64_t n, F cut, double* sums) {
    using X = typename Vec<F, B>::type;
    using I = typename Vec<typename IntOf<F>::type, B>::type;
    constexpr int L = B / sizeof(F), STEP = 8 * L;
    Wide<F, B> first, second, third, fourth;
    I count = {};
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        X s2 = {}, s3 = {}, s4 = {};
        for (int j = 0; j < STEP; j += L) {
            X v = load<X>(x + i + j);
            const I above = v > cut;
            v = (X)((I)v & (ABOVE ? above : ~above));
            if (ABOVE) count += above, first.add(v);
            const X square = v * v;
            s2 += square, s3 += square * v, s4 += square * square;
        }
        second.add(s2), third.add(s3), fourth.add(s4);  // sums of eight numbers are in the precision of F
    }
    if (ABOVE) sums[0] += double(count_of(count)), sums[1] += first.total();
    sums[2] += second.total(), sums[3] += third.total(), sums[4] += fourth.total();
    for (; i < n; ++i) {
        if ((x[i] > cut) != ABOVE) continue;
        const double v = double(x[i]), square = v * v;
        if (ABOVE) sums[0] += 1, sums[1] += v;
        sums[2] += square, sums[3] += square * v, sums[4] += square * square;
    }
}
template <class F, int B> INLINE void above_body(const F* x, int64_t n, F cut, double* sums) {
    add_powers<F, B, true>(x, n, cut, sums);
}
template <class F, int B> INLINE void below_body(const F* x, int64_t n, F cut, double* sums) {
    add_powers<F, B, false>(x, n, cut, sums);
}

// Append the pixels low < p <= high to `found`, which has `count` of them.
template <class F, int B> INLINE void collect_body(const F* x, int64_t n, F low, F high, F* found, int64_t& count) {
    using X = typename Vec<F, B>::type;
    using I = typename Vec<typename IntOf<F>::type, B>::type;
    constexpr int L = B / sizeof(F), STEP = 4 * L;
    F* end = found + count;
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        I inside = {};
        for (int j = 0; j < STEP; j += L) {
            X v = load<X>(x + i + j);
            inside |= (v > low) & ~(v > high);
        }
        int64_t words[B / 8], any = 0;
        std::memcpy(words, &inside, B);
        for (int64_t word : words) any |= word;
        for (int j = 0; any && j < STEP; ++j) {
            *end = x[i + j];
            end += (x[i + j] > low) & !(x[i + j] > high);
        }
    }
    for (; i < n; ++i)
        if (x[i] > low && !(x[i] > high)) *end++ = x[i];
    count = end - found;
}

template <class F, int B> INLINE void mask_body(const F* x, int64_t n, F cut, uint8_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] > cut;
}

// Exact conversion of half precision. `v` is correct from 2^-14 on; a smaller number m·2^-24, subnormal in half precision,
// becomes 2^-15 (1 + m/1024), and 2v - 2^-14 is correct. No float is subnormal: the processor may read these as 0.
// Infinity and NaN become numbers above 1: the check rejects both.
template <int B> INLINE void half_body(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits = (uint32_t(x[i] & 0x7fff) << 13) + (112u << 23);
        const uint32_t sign = uint32_t(x[i] & 0x8000) << 16;
        float v;
        std::memcpy(&v, &bits, 4);
        const float small = v + v - 0x1p-14f;
        v = small < v ? small : v;
        std::memcpy(&bits, &v, 4);
        bits |= sign;
        std::memcpy(out + i, &bits, 4);
    }
}

template <int B> INLINE void bfloat_body(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits = uint32_t(x[i]) << 16;
        std::memcpy(out + i, &bits, 4);
    }
}

// ------------------------------------------------------------------------- loops over nodes and classes

struct Nodes {
    int count = 0;                   // a multiple of 8; the added nodes have weight 0
    alignas(64) double t[MAX_NODES], w[MAX_NODES], s[MAX_NODES], u[MAX_NODES];  // s = e^-t, u = 1 - s
};

struct Run {  // `count` pixels of equal probability
    double value;
    int64_t count;
};

// Per node: Σ log(1 - pu), and Σ p e^-t / (1 - pu), over runs. The logarithm of a product replaces a sum of logarithms:
// 64 factors of at least 3e-4 do not underflow. Numerator and denominator are kept: one division per product.
template <int B> INLINE void fold_body(const Run* runs, int64_t n, const Nodes& nodes, double* logs, double* tilts) {
    using D = typename Vec<double, B>::type;
    constexpr int L = B / 8;
    for (int k = 0; k < nodes.count; k += L) {
        const D s = load<D>(nodes.s + k);
        D log_sum = {}, tilt = {};
        for (int64_t i = 0; i < n;) {
            D top = {}, bottom = D{} + 1.0;
            int factors = 0;
            for (; i < n && factors + std::min<int64_t>(runs[i].count, 64) <= 64; ++i) {
                const D f = (1 - runs[i].value) + runs[i].value * s;
                if (runs[i].count > 16) {
                    D one;
                    for (int j = 0; j < L; ++j) one[j] = std::log(f[j]);
                    log_sum += one * double(runs[i].count);
                    tilt += double(runs[i].count) * runs[i].value / f;
                    continue;
                }
                for (int64_t c = 0; c < runs[i].count; ++c, ++factors) {
                    top = top * f + runs[i].value * bottom;
                    bottom *= f;
                }
            }
            for (int j = 0; j < L; ++j) log_sum[j] += std::log(bottom[j]);
            tilt += top / bottom;
        }
        tilt *= s;
        std::memcpy(logs + k, &log_sum, sizeof log_sum);
        std::memcpy(tilts + k, &tilt, sizeof tilt);
    }
}

// How a sum over nodes, Σ_k weight_k (amount + slope·tilt_k), changes from one volume to the next.
struct Recurrence {
    bool iou;            // weight_k loses the factor of the pixel that joins the mask
    double slope, step;  // and tilt_k grows by step times the pixel's tilted probability
};

// scores[i] = Σ_k weight_k (amounts[i] + slope·tilt_k); then pixel values[i] joins the mask.
template <int B>
INLINE void advance_body(const double* values, const double* amounts, int64_t n, const Nodes& nodes, double* weight,
                         double* tilt, const Recurrence& rule, double* scores) {
    using D = typename Vec<double, B>::type;
    constexpr int L = B / 8;
    for (int64_t i = 0; i < n; ++i) {
        const double p = values[i], amount = amounts[i];
        D sum = {};
        for (int k = 0; k < nodes.count; k += L) {
            D e = load<D>(weight + k);
            const D s = load<D>(nodes.s + k), ratio = s / ((1 - p) + p * s);
            if (rule.slope != 0) {
                D q = load<D>(tilt + k);
                sum += e * (amount + rule.slope * q);
                q += (rule.step * p) * ratio;
                std::memcpy(tilt + k, &q, sizeof q);
            } else {
                sum += e * amount;
            }
            e *= rule.iou ? ratio : s;
            std::memcpy(weight + k, &e, sizeof e);
        }
        scores[i] = 0;
        for (int j = 0; j < L; ++j) scores[i] += sum[j];
    }
}

// Step of an argmax of slope·p + offset over classes: compare class `label` with the best so far of each pixel.
template <class F, int B>
INLINE void challenge_body(const F* x, int64_t n, F slope, F offset, int32_t label, F* gain, int32_t* labels, F* prob) {
    for (int64_t i = 0; i < n; ++i) {
        const F mine = x[i] * slope + offset;
        const bool wins = mine > gain[i];
        gain[i] = wins ? mine : gain[i];
        labels[i] = wins ? label : labels[i];
        prob[i] = wins ? x[i] : prob[i];
    }
}

// Each loop is compiled for several instruction sets, and the best that the processor has is called. Vectors have 32
// bytes with AVX-512 too: with 64 bytes, the loops that GCC 12 makes are more than twice as slow.
int instruction_set() {
#if defined(__x86_64__)
    static const int best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                ? 2
                            : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1
                                                                                              : 0;
    return best;
#else
    return 0;
#endif
}
std::atomic<int> level{instruction_set()};

#if defined(__x86_64__)
#define VARIANTS(NAME, TEMPLATE, ARGUMENT, PARAMETERS, VALUES)                                                        \
    TEMPLATE void NAME##_plain PARAMETERS { NAME##_body<ARGUMENT 16> VALUES; }                                        \
    TEMPLATE __attribute__((target("avx2,fma"))) void NAME##_avx2 PARAMETERS { NAME##_body<ARGUMENT 32> VALUES; } \
    TEMPLATE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void NAME##_avx512 PARAMETERS { \
        NAME##_body<ARGUMENT 32> VALUES;                                                                              \
    }                                                                                                                 \
    TEMPLATE void NAME PARAMETERS {                                                                                   \
        const int set = level.load(std::memory_order_relaxed);                                                        \
        set == 2 ? NAME##_avx512 VALUES : set == 1 ? NAME##_avx2 VALUES : NAME##_plain VALUES;                        \
    }
#else
#define VARIANTS(NAME, TEMPLATE, ARGUMENT, PARAMETERS, VALUES) \
    TEMPLATE void NAME PARAMETERS { NAME##_body<ARGUMENT 16> VALUES; }
#endif
#define COMMA ,
VARIANTS(stats, template <class F>, F COMMA, (const F* x, int64_t n, Stats& out), (x, n, out))
VARIANTS(excess, template <class F>, F COMMA, (const F* x, int64_t n, F cut, Excess& out), (x, n, cut, out))
VARIANTS(largest, template <class F>, F COMMA, (const F* x, int64_t n, F& out), (x, n, out))
VARIANTS(above, template <class F>, F COMMA, (const F* x, int64_t n, F cut, double* sums), (x, n, cut, sums))
VARIANTS(below, template <class F>, F COMMA, (const F* x, int64_t n, F cut, double* sums), (x, n, cut, sums))
VARIANTS(collect, template <class F>, F COMMA, (const F* x, int64_t n, F low, F high, F* found, int64_t& count),
         (x, n, low, high, found, count))
VARIANTS(mask, template <class F>, F COMMA, (const F* x, int64_t n, F cut, uint8_t* out), (x, n, cut, out))
VARIANTS(half, , , (const uint16_t* x, int64_t n, float* out), (x, n, out))
VARIANTS(bfloat, , , (const uint16_t* x, int64_t n, float* out), (x, n, out))
VARIANTS(fold, , , (const Run* runs, int64_t n, const Nodes& nodes, double* logs, double* tilts),
         (runs, n, nodes, logs, tilts))
VARIANTS(advance, , , (const double* values, const double* amounts, int64_t n, const Nodes& nodes, double* weight,
                       double* tilt, const Recurrence& rule, double* scores),
         (values, amounts, n, nodes, weight, tilt, rule, scores))
VARIANTS(challenge, template <class F>, F COMMA,
         (const F* x, int64_t n, F slope, F offset, int32_t label, F* gain, int32_t* labels, F* prob),
         (x, n, slope, offset, label, gain, labels, prob))

// ------------------------------------------------------------------------------------- maps and rows

constexpr int SIZES[] = {2, 2, 4, 8};

// A tensor (N, C, *S) of any strides. `layout` is N, C, strides of both, the number of spatial axes, their sizes and
// their strides, all in elements; axes that are neighbours in memory are one axis already.
struct Map {
    const char* data;
    int dtype, axes;
    int64_t images, classes, image_stride, class_stride, pixels = 1;
    const int64_t *sizes, *strides;

    Map(const void* data, int dtype, const int64_t* layout)
        : data(static_cast<const char*>(data)), dtype(dtype), axes(int(layout[4])), images(layout[0]),
          classes(layout[1]), image_stride(layout[2]), class_stride(layout[3]), sizes(layout + 5),
          strides(layout + 5 + layout[4]) {
        for (int i = 0; i < axes; ++i) pixels *= sizes[i];
    }
    int64_t rows() const { return images * classes; }
    bool contiguous() const { return axes == 1 && (strides[0] == 1 || pixels == 1); }
    const char* row(int64_t r) const {
        return data + SIZES[dtype] * (r / classes * image_stride + r % classes * class_stride);
    }
    template <class T> void copy_strided(const char* from, int64_t start, int64_t n, T* out) const {
        int64_t index[MAX_AXES], offset = 0, left = start;
        for (int i = axes - 1; i >= 0; --i) {
            index[i] = left % sizes[i], left /= sizes[i];
            offset += index[i] * strides[i];
        }
        const T* x = reinterpret_cast<const T*>(from);
        const int64_t step = strides[axes - 1];
        while (n > 0) {
            const int64_t length = std::min(n, sizes[axes - 1] - index[axes - 1]);
            for (int64_t i = 0; i < length; ++i) out[i] = x[offset + i * step];
            out += length, n -= length, offset += length * step, index[axes - 1] += length;
            for (int i = axes - 1; i > 0 && index[i] == sizes[i]; --i) {
                offset += strides[i - 1] - sizes[i] * strides[i];
                index[i] = 0, ++index[i - 1];
            }
        }
    }
    // Pixels start .. start + n of a row as numbers of type F: in place if possible, otherwise in `space` (BLOCK).
    template <class F> const F* block(const char* from, int64_t start, int64_t n, F* space) const {
        alignas(64) char copy[BLOCK * 8];
        const char* raw = copy;
        if (contiguous()) {
            raw = from + start * SIZES[dtype];
        } else if (SIZES[dtype] == 2) {
            copy_strided(from, start, n, reinterpret_cast<uint16_t*>(copy));
        } else if (dtype == FLOAT32) {
            copy_strided(from, start, n, reinterpret_cast<float*>(copy));
        } else {
            copy_strided(from, start, n, reinterpret_cast<double*>(copy));
        }
        if ((dtype == FLOAT32 && sizeof(F) == 4) || dtype == FLOAT64) {
            if (raw != copy && sizeof(F) == size_t(SIZES[dtype])) return reinterpret_cast<const F*>(raw);
            std::memcpy(space, raw, n * sizeof(F));
            return space;
        }
        alignas(64) float narrow[BLOCK];
        const float* singles = narrow;
        float* target = sizeof(F) == 4 ? reinterpret_cast<float*>(space) : narrow;
        if (dtype == FLOAT32)
            singles = reinterpret_cast<const float*>(raw);
        else if (dtype == FLOAT16)
            half(reinterpret_cast<const uint16_t*>(raw), n, target);
        else
            bfloat(reinterpret_cast<const uint16_t*>(raw), n, target);
        if (sizeof(F) == 8)
            for (int64_t i = 0; i < n; ++i) space[i] = F(singles[i]);
        return space;
    }
};

// The parameters of a call: the same for all rows.
struct Problem {
    bool iou;
    double smooth;
    bool pruning;
    double negligible, few, tie;  // rankseg.exact.NEGLIGIBLE, _JACOBI_MAX; rankseg.solver._TIE
    const double* table;          // nodes of every band: times, then weights
    const int64_t* starts;        // (bands + 1,)
    int bands;
    bool losses;  // volumes are compared by score - 1: rankseg.solver.compares_losses

    int band_of(double scale) const {
        const double octave = std::floor(std::log2(scale / few));
        return int(std::min(std::max(octave, -1.0), double(bands - 2))) + 1;
    }
    Nodes nodes(int band) const {
        Nodes result;
        const int n = int(starts[band + 1] - starts[band]);
        const double *times = table + starts[band], *weights = table + starts[bands] + starts[band];
        result.count = (n + 7) / 8 * 8;
        for (int k = 0; k < result.count; ++k) {
            result.t[k] = k < n ? times[k] : 0;
            result.w[k] = k < n ? weights[k] : -std::numeric_limits<double>::infinity();
            result.s[k] = std::exp(-result.t[k]);
            result.u[k] = -std::expm1(-result.t[k]);
        }
        return result;
    }
    // rankseg.surrogate: 1 - a lower bound of the score; by how much a pixel of this probability raises g; g itself.
    double loss_bound(double volume, double captured, double mean) const {
        const double total = volume + mean;
        if (!iou) return (total + 1 - 2 * captured) / (total + smooth + 1);
        const double denominator = total + smooth - captured;
        return denominator > 0 ? (total - 2 * captured) / denominator : 1;
    }
    double step(double value, double loss) const { return (iou ? 2 - loss : 2) * value - (1 - loss); }
    double g(double volume, double captured, double mean, double loss) const {
        const double total = volume + mean, weight = (iou ? 2 - loss : 2) * captured;
        return weight - (total - 1) + loss * (total + smooth - 1) + 1e-12 * total;
    }
    double root(double cut, double excess, double volume, double mean) const {  // surrogate.excess_root
        const double constant = iou ? smooth : smooth / 2, slope = mean + (iou ? 2 * smooth : smooth + 1);
        const double next = cut + (excess + constant - cut * slope) / (volume + slope);
        return std::min(std::max(next, 0.001), 0.999);
    }
};

// Pixels of a row: some in runs, the others in power sums (exact.log_series).
struct Parts {
    std::vector<Run> runs;
    double sums[5] = {};
};

struct Window {
    Parts above, below;     // pixels of every mask that is considered, and of none
    std::vector<Run> runs;  // the pixels between, in decreasing order
    double mean = 0;
};

double log_series(const double* p, double u) { return -u * (p[1] + u * (p[2] / 2 + u * (p[3] / 3 + u * p[4] / 4))); }
double tilted_series(const double* p, double u, double s) { return s * (p[1] + u * (p[2] + u * (p[3] + u * p[4]))); }

void add_power_sums(double* sums, double value, double count) {
    for (int k = 0; k < 5; ++k, count *= value) sums[k] += count;
}

// A mask ends in front of run `split` of the window. Sums of log(1 - pu) over all pixels and over those behind the
// mask's end; tilted sums over the pixels in front of it (those of the mask) and behind it.
struct Factors {
    double all[MAX_NODES], behind[MAX_NODES], front_tilt[MAX_NODES], behind_tilt[MAX_NODES];
    Factors(const Window& w, size_t split, const Nodes& nodes) {
        double logs[4][MAX_NODES], tilts[4][MAX_NODES];
        fold(w.above.runs.data(), int64_t(w.above.runs.size()), nodes, logs[0], tilts[0]);
        fold(w.runs.data(), int64_t(split), nodes, logs[1], tilts[1]);
        fold(w.runs.data() + split, int64_t(w.runs.size() - split), nodes, logs[2], tilts[2]);
        fold(w.below.runs.data(), int64_t(w.below.runs.size()), nodes, logs[3], tilts[3]);
        for (int k = 0; k < nodes.count; ++k) {
            const double u = nodes.u[k], s = nodes.s[k];
            behind[k] = log_series(w.below.sums, u) + logs[2][k] + logs[3][k];
            all[k] = behind[k] + log_series(w.above.sums, u) + logs[0][k] + logs[1][k];
            front_tilt[k] = tilted_series(w.above.sums, u, s) + tilts[0][k] + tilts[1][k];
            behind_tilt[k] = tilted_series(w.below.sums, u, s) + tilts[2][k] + tilts[3][k];
        }
    }
};

// The score (or score - 1) of the empty mask: E γ/(γ+Γ) = P(Γ = 0) + γ ∫ e^{-γt} (G(t) - P(Γ = 0)) dt; 0/0 is 0.
// `log_absent` is log P(Γ = 0), needed for γ < 1, where the integral alone has a pole.
double score_of_nothing(const Problem& problem, const Window& w, double log_absent) {
    const double smooth = problem.smooth;
    if (smooth == 0) return 0;
    const Nodes nodes = problem.nodes(problem.band_of(w.mean + smooth));
    const Factors f(w, 0, nodes);
    double sum = 0;
    for (int k = 0; k < nodes.count; ++k) {
        const double weight = nodes.w[k] - smooth * nodes.t[k];
        if (problem.losses) {
            sum -= std::exp(f.all[k] + weight) * (f.front_tilt[k] + f.behind_tilt[k]);
        } else if (smooth >= 1 || std::isinf(log_absent)) {
            sum += std::exp(f.all[k] + weight);
        } else {
            const double gain = f.all[k] - log_absent;
            sum += gain < 1 ? std::exp(log_absent + weight) * std::expm1(gain)
                            : std::exp(f.all[k] + weight) - std::exp(log_absent + weight);
        }
    }
    return problem.losses ? sum : smooth * sum + (smooth < 1 ? std::exp(log_absent) : 0);
}

// Σ_k weight_k (amount + slope·tilt_k) is the score of `volume` pixels, apart from a factor: see `score_from`.
struct Integrand {
    Recurrence rule;
    alignas(64) double weight[MAX_NODES], tilt[MAX_NODES];
    Integrand(const Problem& problem, const Nodes& nodes, const Factors& f, double volume) {
        if (problem.iou)
            rule = {true, problem.losses ? 1.0 : 0.0, -1};
        else
            rule = {false, problem.losses ? -1.0 : 2.0, problem.losses ? 2.0 : 1.0};
        for (int k = 0; k < nodes.count; ++k) {
            const double logs = problem.iou ? f.behind[k] : f.all[k];
            weight[k] = std::exp(logs + nodes.w[k] - (volume + problem.smooth) * nodes.t[k]);
            tilt[k] = problem.iou      ? f.behind_tilt[k]
                      : problem.losses ? f.front_tilt[k] - f.behind_tilt[k]
                                       : f.front_tilt[k];
        }
    }
    static double amount(const Problem& problem, double volume, double captured) {
        if (problem.losses) return problem.iou ? volume - captured : volume;
        return problem.iou ? 1 : problem.smooth;
    }
    static double score_from(const Problem& problem, double sum, double captured) {
        if (problem.losses) return -sum;
        return problem.iou ? sum * (captured + problem.smooth) : sum;
    }
};

struct Best {
    int64_t tau = 0;
    double value = 0;
    size_t run = 0;       // the run of the window that the mask's volume ends in, and how many of it are selected
    int64_t inside = 0;
};

// The best volume among n + first .. n + last, n the number of pixels above the window; the smallest of tied ones.
Best search(const Problem& problem, const Window& w, int64_t first, int64_t last, double log_absent) {
    std::vector<Best> records;  // volumes that beat all before them and tie with the best
    const int64_t base = std::llround(w.above.sums[0]);
    auto offer = [&](const Best& found) {
        if (!records.empty() && !(found.value > records.back().value)) return;
        records.push_back(found);
        size_t lost = 0;
        const double tolerance = problem.losses ? (w.mean + 1) / (w.mean + 1 + problem.smooth) : found.value;
        while (records[lost].value < found.value - problem.tie * tolerance) ++lost;
        records.erase(records.begin(), records.begin() + lost);
    };
    if (problem.smooth > 0) offer({0, score_of_nothing(problem, w, log_absent), 0, 0});
    size_t run = 0;
    int64_t inside = 0, at = 0;
    double captured = w.above.sums[1];
    for (const Run& part : w.above.runs) captured += part.value * double(part.count);
    int64_t volume = base;
    for (const Run& part : w.above.runs) volume += part.count;
    for (; at < first; ++run) {
        const int64_t take = std::min(w.runs[run].count, first - at);
        captured += double(take) * w.runs[run].value, at += take;
        inside = take;
        if (take < w.runs[run].count) break;
        inside = 0;
    }
    Window split;  // a copy of `w`, if the first volume ends inside a run: that run is cut in two
    while (at <= last) {
        auto scale_at = [&](double tau, double mass) {
            return tau + w.mean + problem.smooth - (problem.iou ? mass : 0);
        };
        const int band = problem.band_of(scale_at(double(volume + at), captured));
        const Nodes nodes = problem.nodes(band);
        const double limit = band < problem.bands - 1 ? problem.few * std::ldexp(1.0, band) : INFINITY;
        const Window* view = &w;
        size_t cut = run;
        if (inside) {
            split = w;
            split.runs[run].count = inside;
            split.runs.insert(split.runs.begin() + run + 1, {w.runs[run].value, w.runs[run].count - inside});
            view = &split, cut = run + 1;
        }
        const Factors f(*view, cut, nodes);
        Integrand integrand(problem, nodes, f, double(volume + at));
        bool same_band = true;
        while (at <= last && same_band) {
            double values[256], amounts[256], masses[256], scores[256];
            Best places[256];
            int64_t n = 0;
            for (; n < 256 && at <= last; ++n, ++at) {
                if (scale_at(double(volume + at), captured) >= limit) {
                    same_band = false;
                    break;
                }
                masses[n] = captured, amounts[n] = Integrand::amount(problem, double(volume + at), captured);
                places[n] = {volume + at, 0, run, inside};
                values[n] = run < w.runs.size() ? w.runs[run].value : 0;
                captured += values[n];
                if (run < w.runs.size() && ++inside == w.runs[run].count) ++run, inside = 0;
            }
            advance(values, amounts, n, nodes, integrand.weight, integrand.tilt, integrand.rule, scores);
            for (int64_t i = 0; i < n; ++i) {
                if (places[i].tau == 0) continue;  // the empty mask is scored apart
                places[i].value = Integrand::score_from(problem, scores[i], masses[i]);
                offer(places[i]);
            }
        }
    }
    return records.empty() ? Best{} : records.front();
}

// The expected score of one mask: all pixels above the window. The window is empty.
double score_of(const Problem& problem, const Window& w, double log_absent) {
    double volume = w.above.sums[0], captured = w.above.sums[1];
    for (const Run& run : w.above.runs) volume += double(run.count), captured += run.value * double(run.count);
    if (volume == 0) return score_of_nothing(problem, w, log_absent);
    const double scale = volume + w.mean + problem.smooth - (problem.iou ? captured : 0);
    const Nodes nodes = problem.nodes(problem.band_of(scale));
    Integrand integrand(problem, nodes, Factors(w, 0, nodes), volume);
    const double none = 0, amount = Integrand::amount(problem, volume, captured);
    double score;
    advance(&none, &amount, 1, nodes, integrand.weight, integrand.tilt, integrand.rule, &score);
    return Integrand::score_from(problem, score, captured);
}

// ------------------------------------------------------------------------------------- one row's search

// Sort values in decreasing order, and count equal ones together. Values of a window are spread evenly as a rule:
// they go to as many bins as there are values, and each bin is sorted.
template <class F> std::vector<Run> runs_of(std::vector<F>& values) {
    const int64_t n = int64_t(values.size());
    if (n > 64) {
        const auto [least, most] = std::minmax_element(values.begin(), values.end());
        const double top = double(*most), scale = double(n - 1) / std::max(top - double(*least), 1e-300);
        std::vector<uint32_t> start(n + 1), bin(n);
        for (int64_t i = 0; i < n; ++i) ++start[1 + (bin[i] = uint32_t((top - double(values[i])) * scale))];
        for (int64_t i = 0; i < n; ++i) start[i + 1] += start[i];
        std::vector<F> sorted(n);
        for (int64_t i = 0; i < n; ++i) sorted[start[bin[i]]++] = values[i];
        for (int64_t i = 0, from = 0; i < n; from = start[i++])
            if (start[i] - from > 1) std::sort(sorted.begin() + from, sorted.begin() + start[i], std::greater<F>());
        values.swap(sorted);
    } else {
        std::sort(values.begin(), values.end(), std::greater<F>());
    }
    std::vector<Run> runs;
    runs.reserve(n);
    for (F v : values) {
        if (runs.empty() || runs.back().value != double(v))
            runs.push_back({double(v), 1});
        else
            ++runs.back().count;
    }
    return runs;
}

void merge_runs(std::vector<Run>& runs) {
    std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.value > b.value; });
    size_t kept = 0;
    for (size_t i = 0; i < runs.size(); ++i) {
        if (kept && runs[kept - 1].value == runs[i].value)
            runs[kept - 1].count += runs[i].count;
        else
            runs[kept++] = runs[i];
    }
    runs.resize(kept);
}

double pairwise_sum(const double* x, int64_t n) {
    if (n > 8) return pairwise_sum(x, n / 2) + pairwise_sum(x + n / 2, n - n / 2);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
}

template <class F> struct Row {
    const Map& map;
    const char* from;
    int threads;  // that share this row

    // Call body(chunk, values, start, n) for every block of every chunk; chunks may run at the same time.
    template <class Body> void visit(const Body& body) const {
        const int64_t chunks = (map.pixels + CHUNK - 1) / CHUNK;
        auto chunk = [&](int64_t c) {
            alignas(64) F space[BLOCK];
            const int64_t end = std::min(map.pixels, (c + 1) * CHUNK);
            for (int64_t start = c * CHUNK; start < end; start += BLOCK) {
                const int64_t n = std::min(BLOCK, end - start);
                body(c, map.block(from, start, n, space), start, n);
            }
        };
        if (threads > 1)
            get_pool().run(chunks, threads, chunk);
        else
            for (int64_t c = 0; c < chunks; ++c) chunk(c);
    }
    int64_t chunks() const { return (map.pixels + CHUNK - 1) / CHUNK; }

    Stats stats_and_sample(int64_t stride, std::vector<F>* sample) const {
        std::vector<Stats> parts(chunks());
        if (sample) sample->resize((map.pixels + stride - 1) / stride);
        visit([&](int64_t c, const F* x, int64_t start, int64_t n) {
            stats(x, n, parts[c]);
            if (sample)
                for (int64_t i = (start + stride - 1) / stride; i * stride < start + n; ++i)
                    (*sample)[i] = x[i * stride - start];
        });
        Stats all;
        for (const Stats& part : parts)
            all.sum += part.sum, all.top = std::max(all.top, part.top), all.bad |= part.bad;
        return all;
    }
    Excess excess_over(double cut) const {
        std::vector<Excess> parts(chunks());
        visit([&](int64_t c, const F* x, int64_t, int64_t n) { excess(x, n, F(cut), parts[c]); });
        Excess all;
        for (const Excess& part : parts) all.excess += part.excess, all.count += part.count;
        return all;
    }
    // Power sums outside of (low, high], and the pixels inside in runs; false if these are more than `most`. With
    // `unsorted`, the pixels are left there instead, unless so many are equal that runs are shorter. Only finished
    // chunks are counted: runs make the count of an unfinished one fall again, so the answer would depend on the
    // order of the threads. The count never falls, and the rest is skipped once it exceeds `most`.
    bool split_at(F low, F high, int64_t most, Window& w, std::vector<F>* unsorted) const {
        struct Piece {
            double above[5] = {}, below[5] = {};
            std::vector<F> found;
            std::vector<Run> runs;
        };
        std::vector<Piece> pieces(chunks());
        std::atomic<int64_t> total{0};
        visit([&](int64_t c, const F* x, int64_t start, int64_t n) {
            Piece& piece = pieces[c];
            if (total > most) return;
            const bool is_last = start + n == std::min(map.pixels, (c + 1) * CHUNK);
            F inside[BLOCK + 1];
            int64_t count = 0;
            for (int64_t end; n > 0; x += end, n -= end) {
                end = std::min(n, PART);
                F top;
                largest(x, end, top);
                below(x, end, low, piece.below);
                if (top > low) collect(x, end, low, high, inside, count);
                if (top > high) above(x, end, high, piece.above);
            }
            piece.found.insert(piece.found.end(), inside, inside + count);
            if (piece.found.size() > 4 * BLOCK) {  // many equal pixels become few runs
                std::vector<Run> runs = runs_of(piece.found);
                piece.runs.insert(piece.runs.end(), runs.begin(), runs.end());
                merge_runs(piece.runs);
                piece.found.clear();
            }
            if (is_last) total += int64_t(piece.found.size() + piece.runs.size());
        });
        if (total > most) return false;
        std::vector<F> found;
        found.reserve(size_t(total));
        std::vector<Run> runs;
        for (Piece& piece : pieces) {
            for (int k = 0; k < 5; ++k) w.above.sums[k] += piece.above[k], w.below.sums[k] += piece.below[k];
            found.insert(found.end(), piece.found.begin(), piece.found.end());
            runs.insert(runs.end(), piece.runs.begin(), piece.runs.end());
            std::vector<F>().swap(piece.found);
        }
        if (unsorted && runs.empty()) {
            unsorted->swap(found);
            return true;
        }
        w.runs = runs_of(found);
        if (!runs.empty()) {
            w.runs.insert(w.runs.end(), runs.begin(), runs.end());
            merge_runs(w.runs);
        }
        return true;
    }
    // The `k` smallest pixels above `bound`, or the `k` largest up to it, in runs.
    std::vector<Run> nearest(F bound, bool upwards, int64_t k) const {
        std::vector<std::vector<F>> kept(chunks());
        auto closer = [&](F a, F b) { return upwards ? a < b : a > b; };
        auto reduce = [&](std::vector<F>& found) {
            if (int64_t(found.size()) <= k) return;
            std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), closer);
            found.resize(size_t(k));
        };
        std::vector<F> limit(chunks(), upwards ? F(2) : F(-1));
        visit([&](int64_t c, const F* x, int64_t, int64_t n) {
            std::vector<F>& found = kept[c];
            F inside[BLOCK + 1];
            int64_t count = 0;
            collect(x, n, upwards ? bound : limit[c], upwards ? limit[c] : bound, inside, count);
            found.insert(found.end(), inside, inside + count);
            if (int64_t(found.size()) > k) {
                reduce(found);
                limit[c] = found[size_t(k) - 1];
            }
        });
        std::vector<F> all;
        for (std::vector<F>& found : kept) {
            all.insert(all.end(), found.begin(), found.end());
            std::vector<F>().swap(found);
            reduce(all);
        }
        return runs_of(all);
    }
    // log P(Γ = 0) = Σ log(1 - p) where it matters: for 0 < γ < 1 and a probability that does not underflow. Sums of
    // pairs, because the score has the absolute error of this sum as its relative error.
    double log_absent(const Problem& problem, double mean) const {
        if (problem.smooth == 0 || problem.smooth >= 1 || mean > 800) return -INFINITY;
        std::vector<double> parts(size_t((map.pixels + BLOCK - 1) / BLOCK));
        visit([&](int64_t, const F* x, int64_t start, int64_t n) {
            double logs[BLOCK];
            for (int64_t i = 0; i < n; ++i) logs[i] = x[i] > 0 ? std::log1p(-double(x[i])) : 0;
            parts[size_t(start / BLOCK)] = pairwise_sum(logs, n);
        });
        return pairwise_sum(parts.data(), int64_t(parts.size()));
    }
    void select(uint8_t* out, double cut, int64_t tied, bool everything) const {
        if (everything) {
            std::memset(out, 1, size_t(map.pixels));
            return;
        }
        visit([&](int64_t, const F* x, int64_t start, int64_t n) { mask(x, n, F(cut), out + start); });
        F space[BLOCK];
        for (int64_t start = 0; tied && start < map.pixels; start += BLOCK) {  // the first of equal pixels
            const int64_t n = std::min(BLOCK, map.pixels - start);
            const F* x = map.block(from, start, n, space);
            for (int64_t i = 0; i < n && tied; ++i)
                if (x[i] == F(cut)) out[start + i] = 1, --tied;
        }
    }
};

int64_t count_runs(const std::vector<Run>& runs) {
    int64_t count = 0;
    for (const Run& run : runs) count += run.count;
    return count;
}

double mass_of(const std::vector<Run>& runs) {
    double mass = 0;
    for (const Run& run : runs) mass += run.value * double(run.count);
    return mass;
}

// The volumes first .. last of the window that g does not exclude, and g at both ends of the window.
struct Interval {
    int64_t first = 0, last = 0, length = 0;
    double loss = 0, left = 0, right = 0;
};

Interval possible(const Problem& problem, const Window& w) {
    const double above = w.above.sums[0] + double(count_runs(w.above.runs));
    const double mass = w.above.sums[1] + mass_of(w.above.runs);
    Interval result;
    // The bound is a ratio of affine functions along a run: its minimum is at an end.
    double volume = above, captured = mass;
    result.loss = problem.loss_bound(volume, captured, w.mean);
    for (const Run& run : w.runs) {
        volume += double(run.count), captured += double(run.count) * run.value;
        result.loss = std::min(result.loss, problem.loss_bound(volume, captured, w.mean));
    }
    volume = above, captured = mass;
    double g = result.left = problem.g(volume, captured, w.mean, result.loss);
    bool inside = g >= 0, any = inside;
    for (const Run& run : w.runs) {
        const double count = double(run.count);
        const double next = problem.g(volume + count, captured + count * run.value, w.mean, result.loss);
        if (!inside && !any && next >= 0) {  // g rises to 0 within this run; one volume too many is harmless
            const double steps = run.count > 1 ? std::floor(-g * count / (next - g)) - 1 : 1;
            result.first = result.length + std::max<int64_t>(1, std::min(run.count, int64_t(steps)));
            inside = any = true;
        }
        if (inside) {
            if (next < 0) {
                const double steps = run.count > 1 ? std::ceil(g * count / (g - next)) + 1 : 0;
                result.last = result.length + std::min(run.count - 1, int64_t(steps));
                inside = false;
            } else {
                result.last = result.length + run.count;
            }
        }
        g = next, volume += count, captured += count * run.value, result.length += run.count;
    }
    result.right = g;
    if (!any) result.first = 0, result.last = result.length;
    return result;
}

// A guess of the bracket (low, high) around the cut-off `cut`, from the density of a sample there: surrogate.bracket.
struct Bracket {
    double low, high;
    template <class F> Bracket(const std::vector<F>& sample, double scale, double cut) {
        Excess near, far;
        excess(sample.data(), int64_t(sample.size()), F(cut - 0.05), near);
        excess(sample.data(), int64_t(sample.size()), F(cut + 0.05), far);
        const double density = double(near.count - far.count + 1) * scale / 0.1;
        const double half = 2.5 * std::sqrt(cut / density) + 0.001 * cut;
        low = std::max(cut - half, 1e-3), high = std::min(cut + half, 1.0);
    }
};

// Keep in the window only the pixels near the cut-off: those alone are sorted.
template <class F> void narrow(const Problem& problem, const std::vector<F>& found, Window& w) {
    double cut = 0.35;
    for (int i = 0; i < 6; ++i) {
        Excess e;
        excess(found.data(), int64_t(found.size()), F(cut), e);
        cut = problem.root(double(F(cut)), e.excess, double(e.count), w.mean);
    }
    const Bracket bracket(found, 1, cut);
    std::vector<F> near;
    for (const F v : found) {
        if (double(v) > bracket.high)
            w.above.runs.push_back({double(v), 1});
        else if (double(v) > bracket.low)
            near.push_back(v);
        else
            w.below.runs.push_back({double(v), 1});
    }
    w.runs = runs_of(near);
}

struct Answer {
    int64_t tau = 0, tied = 0;
    double cut = 0;
    bool everything = false, bad = false;
};

template <class F> Answer solve_row(const Problem& problem, const Row<F>& row) {
    const int64_t pixels = row.map.pixels, stride = pixels / SAMPLE | 1;
    Answer answer;
    std::vector<F> sample;
    const Stats s = row.stats_and_sample(stride, pixels > SHORT ? &sample : nullptr);
    answer.bad = s.bad;
    if (s.bad) return answer;
    if (s.top <= (problem.pruning ? 0.5 : 0.0)) {
        answer.cut = s.top;
        return answer;
    }
    const double mean = s.sum, total = mean + problem.smooth;
    // If `total` is at most 1 / negligible, confident pixels are too large for the power sums and stay in the window.
    const bool small = total * problem.negligible <= 1.01;
    double low, high, cut = 0.35;
    if (small) {
        low = std::min(0.99 * problem.negligible * total, 0.1), high = 1;
    } else {
        double volume = 0, excess_sum = 0;
        const double scale = pixels > SHORT ? double(stride) : 1;
        for (int i = 0; i < 5; ++i) {
            Excess e;
            if (pixels > SHORT)
                excess(sample.data(), int64_t(sample.size()), F(cut), e);
            else
                e = row.excess_over(cut);
            volume = double(e.count) * scale, excess_sum = e.excess * scale;
            cut = problem.root(double(F(cut)), excess_sum, volume, mean);
        }
        if (pixels > SHORT) {  // one step on all pixels removes the sampling error
            const Excess e = row.excess_over(cut);
            cut = problem.root(double(F(cut)), e.excess, double(e.count), mean);
        } else {
            sample.resize(size_t(pixels));
            row.visit([&](int64_t, const F* x, int64_t start, int64_t n) { std::copy(x, x + n, sample.data() + start); });
        }
        const Bracket bracket(sample, scale, cut);
        low = bracket.low, high = bracket.high;
    }
    const int64_t most = std::max<int64_t>(1 << 16, pixels / 64);
    Window w;
    Interval interval;
    bool narrows = small;  // small objects, first attempt: reduce the window to the pixels near the cut-off
    for (int shrinks = 0;;) {
        w = Window();
        w.mean = mean;
        const F below = F(low), above = F(high);
        std::vector<F> found;
        if (!row.split_at(below, above, shrinks < SHRINKS ? most : pixels, w, narrows ? &found : nullptr)) {
            ++shrinks;
            low = cut - (cut - low) / 8, high = cut + (high - cut) / 8;
            continue;
        }
        if (found.size() > 256)
            narrow(problem, found, w);
        else if (narrows && !found.empty())
            w.runs = runs_of(found);
        const double single = mass_of(w.runs) + mass_of(w.above.runs) + mass_of(w.below.runs);
        w.below.sums[1] = std::max(mean - w.above.sums[1] - single, 0.0);
        interval = possible(problem, w);
        auto is_left_open = [&] {
            return (w.above.sums[0] > 0 || !w.above.runs.empty()) && interval.first == 0;
        };
        auto is_right_open = [&] {
            const int64_t end = std::llround(w.above.sums[0]) + count_runs(w.above.runs) + interval.length;
            return end < pixels && interval.last == interval.length;
        };
        if ((is_left_open() && !w.above.runs.empty()) || (is_right_open() && !w.below.runs.empty())) {
            w.above.runs.clear(), w.below.runs.clear();  // too narrow: sort all
            w.runs = runs_of(found);
            interval = possible(problem, w);
        }
        narrows = false;
        // Each further pixel outwards lowers g by at least `fall`: g / fall of them can matter.
        if (is_left_open() && double(above) < 1) {
            const double fall = problem.step(double(above), interval.loss);
            if (fall > 0 && interval.left / fall < double(most)) {
                const auto runs = row.nearest(above, true, int64_t(interval.left / fall) + 2);
                for (const Run& run : runs) add_power_sums(w.above.sums, run.value, -double(run.count));
                w.runs.insert(w.runs.begin(), runs.begin(), runs.end());
                interval = possible(problem, w);
            }
        }
        if (is_right_open() && below >= 0) {
            const double fall = -problem.step(double(below), interval.loss);
            if (fall > 0 && interval.right / fall < double(most)) {
                const auto runs = row.nearest(below, false, int64_t(interval.right / fall) + 2);
                for (const Run& run : runs) add_power_sums(w.below.sums, run.value, -double(run.count));
                w.runs.insert(w.runs.end(), runs.begin(), runs.end());
                interval = possible(problem, w);
            }
        }
        if (!is_left_open() && !is_right_open()) break;
        shrinks = SHRINKS;  // from here on the bracket only grows
        const double width = high - low;
        low = std::max(low - 2 * width, low > 1e-5 ? low / 4 : -1.0);
        high = std::min(high + 2 * width, 1.0);
    }
    const Best best = search(problem, w, interval.first, interval.last, row.log_absent(problem, mean));
    answer.tau = best.tau;
    if (best.tau == 0) {
        answer.cut = s.top;
    } else if (best.tau == pixels) {
        answer.everything = true;
    } else {
        answer.cut = w.runs[best.run].value, answer.tied = best.inside;
    }
    return answer;
}

template <class F> double expected_row(const Problem& problem, const Row<F>& row, const uint8_t* masks, bool& bad) {
    const Stats s = row.stats_and_sample(1, nullptr);
    if ((bad = s.bad)) return 0;
    const double total = s.sum + problem.smooth;
    const F low = F(0.9 * problem.negligible * total);
    struct Piece {
        double all[5] = {}, chosen[5] = {};
        int64_t count = 0;  // of the mask
        std::vector<F> inside, outside;
    };
    std::vector<Piece> pieces(size_t(row.chunks()));
    row.visit([&](int64_t c, const F* x, int64_t start, int64_t n) {
        Piece& piece = pieces[size_t(c)];
        const uint8_t* marks = masks + start;
        alignas(64) F all[BLOCK], chosen[BLOCK];
        for (int64_t i = 0; i < n; ++i) {
            const bool single = x[i] > low;
            all[i] = single ? F(0) : x[i];
            chosen[i] = marks[i] ? all[i] : F(0);
        }
        if (low < 1)
            for (int64_t i = 0; i < n; ++i)
                if (x[i] > low) (marks[i] ? piece.inside : piece.outside).push_back(x[i]);
        for (int64_t i = 0; i < n; ++i) piece.count += marks[i] != 0;
        above(all, n, F(0), piece.all), above(chosen, n, F(0), piece.chosen);
    });
    Window w;
    w.mean = s.sum;
    std::vector<F> inside, outside;
    for (Piece& piece : pieces) {
        inside.insert(inside.end(), piece.inside.begin(), piece.inside.end());
        outside.insert(outside.end(), piece.outside.begin(), piece.outside.end());
        w.above.sums[0] += double(piece.count);
        for (int k = 1; k < 5; ++k) {
            w.above.sums[k] += piece.chosen[k];
            w.below.sums[k] += piece.all[k] - piece.chosen[k];
        }
    }
    w.above.sums[0] -= double(inside.size());
    w.above.runs = runs_of(inside), w.below.runs = runs_of(outside);
    return score_of(problem, w, w.above.sums[0] == 0 && inside.empty() ? row.log_absent(problem, w.mean) : 0);
}

// --------------------------------------------------------------------------------- non-overlapping masks

struct ClassScore {
    double value, denominator, loss;
};

ClassScore class_score(const Problem& problem, double mass, double volume, double mean) {
    if (!problem.iou) {
        const double denominator = volume + mean + problem.smooth + 1;
        return {(2 * mass + problem.smooth) / denominator, denominator, (volume + mean + 1 - 2 * mass) / denominator};
    }
    const double denominator = std::max(volume + mean + problem.smooth - mass, 1e-12);
    return {(mass + problem.smooth) / denominator, denominator, (volume + mean - 2 * mass) / denominator};
}

// rankseg/nonoverlap.py: rounds of re-weighted argmax over classes, until the objective of an image stops rising.
template <class F>
bool one_label(const Problem& problem, const Map& map, int threads, uint8_t* masks, int64_t* tau, double* cutpoint) {
    const int64_t C = map.classes, N = map.images, D = map.pixels, rows = map.rows();
    const int64_t chunk = 4 * BLOCK, chunks = (D + chunk - 1) / chunk;
    struct Piece {
        std::vector<double> mass, top;
        std::vector<int64_t> volume;
        std::vector<Stats> stats;
    };
    std::vector<double> mean(rows), slope(rows, 1.0), offset(rows, 0.0), value(rows), denominator(rows), objective(N);
    std::vector<char> present(rows), active(N, 1);
    std::vector<Stats> all(rows);
    get_pool().run(rows, threads, [&](int64_t r) {
        all[r] = Row<F>{map, map.row(r), 1}.stats_and_sample(1, nullptr);
    });
    for (int64_t r = 0; r < rows; ++r) {
        if (all[r].bad) return false;
        mean[r] = all[r].sum, present[r] = all[r].top > (problem.pruning ? 0.5 : 0.0);
    }
    std::vector<int64_t> images(N);
    for (int64_t i = 0; i < N; ++i) images[i] = i;
    std::vector<double> mass(rows), largest(rows);
    std::vector<int64_t> volume(rows);
    // Give each pixel to the class of the largest positive slope·p + offset, the first of equal ones.
    auto assign = [&](bool write) {
        std::vector<Piece> pieces(images.size() * size_t(chunks));
        get_pool().run(int64_t(pieces.size()), threads, [&](int64_t index) {
            const int64_t image = images[size_t(index / chunks)], c = index % chunks, end = std::min(D, (c + 1) * chunk);
            Piece& piece = pieces[size_t(index)];
            piece.mass.assign(C + 1, 0), piece.volume.assign(C + 1, 0);
            if (write) piece.top.assign(C, 0);
            alignas(64) F space[BLOCK], gain[BLOCK], prob[BLOCK];
            alignas(64) int32_t labels[BLOCK];
            for (int64_t start = c * chunk; start < end; start += BLOCK) {
                const int64_t n = std::min(BLOCK, end - start);
                std::fill(gain, gain + n, F(0)), std::fill(prob, prob + n, F(0));
                std::fill(labels, labels + n, int32_t(C));
                for (int64_t k = 0; k < C; ++k) {
                    const int64_t r = image * C + k;
                    if (offset[r] == -INFINITY) continue;
                    challenge(map.block(map.row(r), start, n, space), n, F(slope[r]), F(offset[r]), int32_t(k), gain,
                              labels, prob);
                }
                for (int64_t i = 0; i < n; ++i) piece.mass[labels[i]] += double(prob[i]), ++piece.volume[labels[i]];
                if (!write) continue;
                for (int64_t k = 0; k < C; ++k) {
                    const int64_t r = image * C + k;
                    uint8_t* out = masks + r * D + start;
                    const F* x = map.block(map.row(r), start, n, space);
                    const int32_t label = present[r] ? int32_t(k) : -1;
                    F top = 0;
                    for (int64_t i = 0; i < n; ++i) {
                        const bool mine = labels[i] == label;
                        out[i] = mine;
                        const F rest = mine ? F(0) : x[i];
                        top = rest > top ? rest : top;
                    }
                    piece.top[k] = std::max(piece.top[k], double(top));
                }
            }
        });
        for (size_t i = 0; i < images.size(); ++i) {
            for (int64_t k = 0; k < C; ++k) {
                const int64_t r = images[i] * C + k;
                mass[r] = 0, volume[r] = 0, largest[r] = 0;
                for (int64_t c = 0; c < chunks; ++c) {
                    const Piece& piece = pieces[i * size_t(chunks) + size_t(c)];
                    if (present[r]) mass[r] += piece.mass[k], volume[r] += piece.volume[k];
                    if (write) largest[r] = std::max(largest[r], piece.top[k]);
                }
            }
        }
    };
    // Slopes and offsets of the best map so far: the argmax to begin with.
    std::vector<double> best_slope = slope, best_offset = offset;
    for (int round = 0; round <= ROUNDS && !images.empty(); ++round) {
        assign(false);
        std::vector<int64_t> risen;
        for (int64_t image : images) {
            double sum = 0;
            std::vector<ClassScore> scores(C);
            for (int64_t k = 0; k < C; ++k) {
                const int64_t r = image * C + k;
                scores[k] = class_score(problem, mass[r], double(volume[r]), mean[r]);
                if (present[r]) sum += problem.losses ? -scores[k].loss : scores[k].value;
            }
            if (round && !(sum > objective[image] + std::abs(objective[image]) * MIN_GAIN)) continue;
            objective[image] = sum;
            risen.push_back(image);
            for (int64_t k = 0; k < C; ++k) {
                const int64_t r = image * C + k;
                best_slope[r] = slope[r], best_offset[r] = offset[r];
                slope[r] = (problem.iou ? 1 + scores[k].value : 2) / scores[k].denominator;
                offset[r] = present[r] ? -scores[k].value / scores[k].denominator : -INFINITY;
            }
        }
        images.swap(risen);
    }
    slope = best_slope, offset = best_offset;
    images.resize(size_t(N));
    for (int64_t i = 0; i < N; ++i) images[i] = i;
    assign(true);
    std::copy(volume.begin(), volume.end(), tau);
    std::copy(largest.begin(), largest.end(), cutpoint);
    return true;
}

Problem problem_of(const Map& map, int iou, double smooth, int pruning, const double* constants, const double* table,
                   const int64_t* starts, int bands) {
    return {iou != 0,     smooth, pruning != 0, constants[0], constants[1],
            constants[2], table,  starts,       bands,        smooth > double(map.pixels)};
}

// Call body(row, threads): if rows are long, one after the other, each by all threads; otherwise each by one thread.
template <class Body> void for_rows(const Map& map, int threads, const Body& body) {
    if (map.pixels >= LONG) {
        for (int64_t r = 0; r < map.rows(); ++r) body(r, threads);
    } else {
        const int useful = map.rows() * map.pixels < CHUNK ? 1 : threads;  // waking a thread costs more than small maps
        get_pool().run(map.rows(), useful, [&](int64_t r) { body(r, 1); });
    }
}

template <class F>
bool solve_rows(const Problem& problem, const Map& map, int threads, uint8_t* masks, int64_t* tau, double* cutpoint) {
    std::atomic<bool> bad{false};
    for_rows(map, threads, [&](int64_t r, int sharing) {
        if (bad) return;
        const Row<F> row{map, map.row(r), sharing};
        const Answer found = solve_row(problem, row);
        if (found.bad) {
            bad = true;
            return;
        }
        tau[r] = found.tau;
        cutpoint[r] = found.everything ? 0 : found.cut;
        if (found.tau == 0)
            std::memset(masks + r * map.pixels, 0, size_t(map.pixels));
        else
            row.select(masks + r * map.pixels, found.cut, found.tied, found.everything);
    });
    return !bad;
}

template <class F>
bool expected_rows(const Problem& problem, const Map& map, int threads, const uint8_t* masks, double* value) {
    std::atomic<bool> bad{false};
    for_rows(map, threads, [&](int64_t r, int sharing) {
        if (bad) return;
        bool wrong = false;
        value[r] = expected_row(problem, Row<F>{map, map.row(r), sharing}, masks + r * map.pixels, wrong);
        if (wrong) bad = true;
    });
    return !bad;
}

template <class Body> int32_t status_of(const Body& body) {
    try {
        return body() ? OK : BAD_VALUES;
    } catch (...) {
        return NO_MEMORY;
    }
}

bool is_double(const Map& map) { return map.dtype == FLOAT64 || map.pixels <= SHORT; }

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Increased when a signature below changes; rankseg/native.py rejects a library with another number.
EXPORT int32_t rankseg_abi() { return 2; }

// Use at most this instruction set (0 the architecture's minimum, 1 AVX2, 2 AVX-512) from now on; return the one used.
EXPORT int32_t rankseg_instruction_set(int32_t wanted) {
    level = std::max(0, std::min(wanted, instruction_set()));
    return level;
}

// masks (N·C·D) bytes, tau (N·C), cutpoint (N·C): see rankseg.solver.Solution.
EXPORT int32_t rankseg_solve(const void* data, int32_t dtype, const int64_t* layout, int32_t iou, double smooth,
                             int32_t pruning, const double* constants, const double* table, const int64_t* starts,
                             int32_t bands, int32_t threads, uint8_t* masks, int64_t* tau, double* cutpoint) {
    return status_of([&] {
        const Map map(data, dtype, layout);
        const Problem problem = problem_of(map, iou, smooth, pruning, constants, table, starts, bands);
        return is_double(map) ? solve_rows<double>(problem, map, threads, masks, tau, cutpoint)
                              : solve_rows<float>(problem, map, threads, masks, tau, cutpoint);
    });
}

// The expected score (N·C) of the masks (N·C·D) given.
EXPORT int32_t rankseg_expected(const void* data, int32_t dtype, const int64_t* layout, int32_t iou, double smooth,
                                const double* constants, const double* table, const int64_t* starts, int32_t bands,
                                int32_t threads, const uint8_t* masks, double* value) {
    return status_of([&] {
        const Map map(data, dtype, layout);
        Problem problem = problem_of(map, iou, smooth, 0, constants, table, starts, bands);
        problem.losses = false;
        return is_double(map) ? expected_rows<double>(problem, map, threads, masks, value)
                              : expected_rows<float>(problem, map, threads, masks, value);
    });
}

// As rankseg_solve, for masks that do not overlap.
EXPORT int32_t rankseg_one_label(const void* data, int32_t dtype, const int64_t* layout, int32_t iou, double smooth,
                                 int32_t pruning, int32_t threads, uint8_t* masks, int64_t* tau, double* cutpoint) {
    return status_of([&] {
        const Map map(data, dtype, layout);
        const double unused[3] = {};
        const Problem problem = problem_of(map, iou, smooth, pruning, unused, nullptr, nullptr, 0);
        return map.dtype == FLOAT64 ? one_label<double>(problem, map, threads, masks, tau, cutpoint)
                                    : one_label<float>(problem, map, threads, masks, tau, cutpoint);
    });
}
