// The core's scan against plain loops over tokens in double precision. The gradients of log decays come from the
// recurrence's own backward: d g_t = <S_{t-1} exp(g_t), d S_t>, whatever the core does about it.
#include <algorithm>
#include <cstring>

#include "foveate_cpu.h"
#include "tools.h"

namespace {

// (B, H, n, width) floats with gaps of NaN between rows.
struct Rows {
    int64_t heads, n, width, stride;
    Array<float> data;
    Rows(int64_t batch, int64_t heads, int64_t n, int64_t width)
        : heads(heads), n(n), width(width), stride(width + integer(0, 2) * 3),
          data((batch * heads * n - 1) * stride + width, NOT_A_NUMBER) {}
    float& at(int64_t bh, int64_t t, int64_t j) { return data[(bh * n + t) * stride + j]; }
    void random(int64_t batch) {
        for (int64_t i = 0; i < batch * heads * n * width; ++i) at(i / width / n, i / width % n, i % width) = (float)normal();
    }
    fv_tensor view() { return {data.data.get(), heads * n * stride, n * stride, stride}; }
};

struct Expected {
    std::vector<double> out, last, d_q, d_k, d_v, d_g, d_state;
};

struct Problem {
    int64_t B, H, n, d, e, dg;  // dg: numbers per token in the gradient of decays
    bool decay, constant, inclusive;
    Rows q, k, v, g, d_out;
    Array<float> state, d_last;
};

double log_decay(Problem& p, int64_t bh, int64_t t, int64_t i) {
    return p.decay ? p.g.at(bh, p.constant ? 0 : t, p.dg > 1 ? i : 0) : 0.0;
}

Expected plain_loops(Problem& p) {
    const int64_t heads = p.B * p.H, n = p.n, d = p.d, e = p.e;
    Expected x;
    x.out.assign(heads * n * e, 0), x.last.assign(heads * d * e, 0);
    x.d_q.assign(heads * n * d, 0), x.d_k.assign(heads * n * d, 0), x.d_v.assign(heads * n * e, 0);
    x.d_g.assign(heads * n * p.dg, 0), x.d_state.assign(heads * d * e, 0);
    for (int64_t h = 0; h < heads; ++h) {
        std::vector<double> s((n + 1) * d * e);
        for (int64_t i = 0; i < d * e; ++i) s[i] = p.state[h * d * e + i];
        for (int64_t t = 0; t < n; ++t)
            for (int64_t i = 0; i < d; ++i)
                for (int64_t j = 0; j < e; ++j) {
                    const double faded = std::exp(log_decay(p, h, t, i)) * s[(t * d + i) * e + j];
                    const double pair = (double)p.k.at(h, t, i) * p.v.at(h, t, j);
                    s[((t + 1) * d + i) * e + j] = faded + pair;
                    x.out[(h * n + t) * e + j] += p.q.at(h, t, i) * (p.inclusive ? faded + pair : faded);
                }
        std::vector<double> ds(d * e);
        for (int64_t i = 0; i < d * e; ++i) x.last[h * d * e + i] = s[n * d * e + i], ds[i] = p.d_last[h * d * e + i];
        for (int64_t t = n - 1; t >= 0; --t)
            for (int64_t i = 0; i < d; ++i) {
                const double factor = std::exp(log_decay(p, h, t, i));
                for (int64_t j = 0; j < e; ++j) {
                    const double after = s[((t + 1) * d + i) * e + j], before = s[(t * d + i) * e + j];
                    const double go = p.d_out.at(h, t, j), pair = ds[i * e + j] + (p.inclusive ? p.q.at(h, t, i) * go : 0);
                    x.d_q[(h * n + t) * d + i] += go * (p.inclusive ? after : factor * before);
                    x.d_k[(h * n + t) * d + i] += pair * p.v.at(h, t, j);
                    x.d_v[(h * n + t) * e + j] += pair * p.k.at(h, t, i);
                    const double all = ds[i * e + j] + p.q.at(h, t, i) * go;
                    x.d_g[(h * n + t) * p.dg + (p.dg > 1 ? i : 0)] += factor * before * all;
                    ds[i * e + j] = factor * all;
                }
            }
        for (int64_t i = 0; i < d * e; ++i) x.d_state[h * d * e + i] = ds[i];
    }
    return x;
}

struct Results {
    Array<float> out, last, borders, d_q, d_k, d_v, d_g, d_state;
};

void compare(const char* what, const Array<float>& got, const std::vector<double>& want, int64_t parts) {
    double largest = 1;
    for (double x : want) largest = std::max(largest, std::fabs(x));
    for (size_t i = 0; i < want.size(); ++i) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += got[part * (int64_t)want.size() + (int64_t)i];
        close(what, sum / largest, want[i] / largest, 2e-5);
    }
}

bool same(const Array<float>& a, const Array<float>& b) { return std::memcmp(a.data.get(), b.data.get(), a.size * 4) == 0; }

}  // namespace

void run_scan_case(uint64_t seed, int64_t largest) {
    engine.seed(seed + 1000000);
    const int64_t B = integer(1, 2), H = integer(1, 3), n = integer(1, 2 * largest), d = integer(1, 40), e = integer(1, 70);
    const int kind = (int)integer(0, 2);
    const bool constant = chance(0.3), begin = chance(0.6), end = chance(0.6);
    const double size = chance(0.5) ? 0.05 : 1, resets = chance(0.5) ? 0 : 0.1;
    const int64_t dg = kind == 2 ? d : 1;
    Problem p{B, H, n, d, e, dg, kind > 0, constant, chance(0.7), Rows(B, H, n, d), Rows(B, H, n, d), Rows(B, H, n, e),
              Rows(B, H, constant ? 1 : n, dg), Rows(B, H, n, e), Array<float>(B * H * d * e), Array<float>(B * H * d * e)};
    p.q.random(B), p.k.random(B), p.v.random(B), p.d_out.random(B), p.g.random(B);
    for (int64_t h = 0; h < B * H; ++h)
        for (int64_t t = 0; t < p.g.n; ++t)
            for (int64_t i = 0; i < dg; ++i) {
                float& g = p.g.at(h, t, i);
                g = chance(resets) ? (chance(0.5) ? -(float)INF : -1e4f) : -(float)size * std::fabs(g);
            }
    for (int64_t i = 0; i < p.state.size; ++i) {
        p.state[i] = begin ? (float)normal() : 0.0f;
        p.d_last[i] = end ? (float)normal() : 0.0f;
    }
    const Expected want = plain_loops(p);

    fv_scan job;
    std::memset(&job, 0, sizeof job);
    job.abi = FV_ABI, job.channels = kind == 2, job.inclusive = p.inclusive;
    job.batch = B, job.heads = H, job.n = n, job.dim = d, job.dim_v = e;
    job.chunk = 16 * integer(1, 4), job.span = job.chunk * integer(1, 4);
    job.parts = e > 16 ? integer(1, 2) : 1, job.width = (e + 16 * job.parts - 1) / (16 * job.parts) * 16;
    job.parts = (e + job.width - 1) / job.width;
    job.q = p.q.view(), job.k = p.k.view(), job.v = p.v.view(), job.d_out = p.d_out.view();
    if (p.decay) job.decay = p.g.view();
    if (constant) job.decay.stride_n = 0;
    if (begin) job.state = p.state.data.get();
    if (end) job.d_last = p.d_last.data.get();
    const auto empty = [](int64_t size) { return Array<float>(size, NOT_A_NUMBER); };
    for (int isa = 0; isa <= fv_best_isa(); ++isa) {
        std::vector<Results> both;
        for (int threads : {1, 3}) {
            const int64_t heads = B * H, rows = heads * n, states = heads * d * e;
            both.push_back({empty(rows * e), empty(states), empty((n - 1) / job.span * states), empty(job.parts * rows * d),
                            empty(job.parts * rows * d), empty(rows * e), empty(job.parts * rows * dg), empty(states)});
            Results& r = both.back();
            job.isa = isa, job.threads = threads;
            job.out = r.out.data.get(), job.last = r.last.data.get(), job.borders = r.borders.data.get();
            job.d_q = r.d_q.data.get(), job.d_k = r.d_k.data.get(), job.d_v = r.d_v.data.get();
            job.d_decay = r.d_g.data.get(), job.d_state = r.d_state.data.get();
            if (fv_scan_forward(&job)) throw Failure{"fv_scan_forward refused"};
            if (fv_scan_backward(&job)) throw Failure{"fv_scan_backward refused"};
        }
        const Results &r = both[0], &other = both[1];
        try {
            compare("out", r.out, want.out, 1), compare("last", r.last, want.last, 1);
            compare("d_q", r.d_q, want.d_q, job.parts), compare("d_k", r.d_k, want.d_k, job.parts);
            compare("d_v", r.d_v, want.d_v, 1), compare("d_state", r.d_state, want.d_state, 1);
            if (p.decay) compare("d_decay", r.d_g, want.d_g, job.parts);
            if (!same(r.out, other.out) || !same(r.last, other.last) || !same(r.d_q, other.d_q) || !same(r.d_k, other.d_k) ||
                !same(r.d_v, other.d_v) || !same(r.d_g, other.d_g) || !same(r.d_state, other.d_state))
                throw Failure{"one thread and three threads differ"};
        } catch (Failure& failure) {
            char where[160];
            std::snprintf(where, sizeof where, " (scan, level %d, decay %d, n %lld, dims %lld and %lld, chunk %lld)", isa, kind,
                          (long long)n, (long long)d, (long long)e, (long long)job.chunk);
            throw Failure{failure.what + where};
        }
    }
}
