// Linear attention with decay, one (batch, head) and some columns of v at a time: chunks of tokens as matrix products, a
// state from chunk to chunk. Nothing is as long as the sequence but inputs and outputs.
#pragma once
#include "scan_channels.h"

namespace FV_NAMESPACE {

// What one task sees: pointers to its rows, its columns of v and of the state.
struct Head {
    const fv_scan& job;
    const float *q, *k, *v, *g, *d_out;
    int64_t index, part, first, width, n, chunk;  // index: of (batch, head); first: column of v
    Head(const fv_scan& job, int64_t task) : job(job) {
        index = task / job.parts;
        const int64_t b = index / job.heads, h = index % job.heads;
        part = task % job.parts, first = part * job.width;
        width = job.dim_v - first < job.width ? job.dim_v - first : job.width;
        n = job.n, chunk = job.chunk;
        q = at(job.q, b, h), k = at(job.k, b, h), v = at(job.v, b, h) + first;
        g = job.decay.data ? at(job.decay, b, h) : nullptr;
        d_out = job.d_out.data ? at(job.d_out, b, h) + first : nullptr;
    }
    static const float* at(const fv_tensor& t, int64_t b, int64_t h) {
        return (const float*)t.data + b * t.stride_b + h * t.stride_h;
    }
    // Part of a contiguous (B, H, dim, dim_v).
    int64_t state() const { return index * job.dim * job.dim_v + first; }
    // The state at the border of span i; that of span 0 is where the sequence begins. NULL: zeros.
    const float* border(int64_t i) const {
        if (i == 0) return job.state ? job.state + state() : nullptr;
        const int64_t kept = (n - 1) / job.span;
        return job.borders + (index * kept + i - 1) * job.dim * job.dim_v + first;
    }
    int64_t padded_dim() const { return up(job.dim, W); }
    int64_t padded_width() const { return up(job.width, W); }
    void prepare(Table& table, int64_t t, int64_t count, bool) const {
        table.prepare(g ? g + t * job.decay.stride_n : nullptr, job.decay.stride_n, count, job.inclusive);
    }
    void prepare(Channels& c, int64_t t, int64_t count, bool only_until) const {
        c.prepare(g + t * job.decay.stride_n, job.decay.stride_n, count, job.dim, only_until);
    }
};

static inline int64_t decay_floats(const fv_scan& job, bool backward) {
    return job.channels ? Channels::floats(job.chunk, up(job.dim, W), backward) : Table::floats(job.chunk);
}

// Panels of a forward task.
static inline int64_t forward_floats(const fv_scan& job) {
    const int64_t c = job.chunk, d = up(job.dim, W), e = up(job.width, W);
    return decay_floats(job, false) + 3 * c * d + 2 * c * e + c * c + d * e;
}

static inline void scale_rows(float* to, const float* factors, int64_t rows, int64_t ld) {
    for (int64_t i = 0; i < rows; ++i) times(to + i * ld, splat(factors[i]), to + i * ld, ld);
}

// s += lost * s, which keeps more digits than a factor near 1 has.
static inline void fade(float* s, vfa lost, int64_t n) {
    for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) + lost * load(s + j));
}

template <class Decays>
static void scan_forward(const fv_scan& job, int64_t task, float* p) {
    constexpr bool channels = sizeof(Decays) == sizeof(Channels);
    const Head head(job, task);
    const int64_t n = head.n, c = head.chunk, d = head.padded_dim(), e = head.padded_width();
    Decays decays = [&] {
        if constexpr (channels) return Channels(p, c, d);
        else return Table(p, c);
    }();
    p += decay_floats(job, false);
    float *q = p, *k = q + c * d, *kt = k + c * d, *v = kt + c * d, *out = v + c * e, *a = out + c * e, *s = a + c * c;
    bool state = job.state;
    fill(s, e, d, state ? head.border(0) : nullptr, job.dim_v, state ? job.dim : 0, head.width);
    for (int64_t t = 0; t < n; t += c) {
        const int64_t count = n - t < c ? n - t : c, rows = up(count, ROWS);
        if (job.borders && t && t % job.span == 0)
            empty((float*)head.border(t / job.span), job.dim_v, s, e, job.dim, head.width);
        fill(q, d, rows, head.q + t * job.q.stride_n, job.q.stride_n, count, job.dim);
        fill(k, d, rows, head.k + t * job.k.stride_n, job.k.stride_n, count, job.dim);
        fill(v, e, rows, head.v + t * job.v.stride_n, job.v.stride_n, count, head.width);
        head.prepare(decays, t, count, false);
        turn(k, d, rows, d, kt, c);
        if constexpr (channels) {
            decays.scores(q, k, kt, count, job.inclusive, a);
        } else {
            product<false>(q, d, kt, c, rows, rows, d, a, c, false, LOWER);
            decays.weigh(a, rows);
        }
        product<false>(a, c, v, e, rows, e, rows, out, e, false, BEFORE);
        if (state) {
            if constexpr (channels) decays.whole_since(count, q);
            else if (head.g) scale_rows(q, decays.since, rows, d);
            product<false>(q, d, s, e, rows, e, d, out, e, true);
        }
        empty(job.out + (head.index * n + t) * job.dim_v + head.first, job.dim_v, out, e, count, head.width);
        if (t + c >= n && !job.last) break;
        if constexpr (channels) {
            for (int64_t i = 0; i < d && state; ++i) fade(s + i * e, splat(decays.lost[i]), e);
            product<false>(decays.turned, c, v, e, d, e, rows, s, e, true);
        } else {
            if (head.g && state) fade(s, splat(decays.lost), d * e);
            if (head.g) scale_rows(k, decays.until, rows, d);
            product<true>(k, d, v, e, d, e, rows, s, e, true);
        }
        state = true;
    }
    if (job.last) empty(job.last + head.state(), job.dim_v, s, e, job.dim, head.width);
}

}  // namespace FV_NAMESPACE
