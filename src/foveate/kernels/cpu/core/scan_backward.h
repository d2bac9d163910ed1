// Gradients of one (batch, head) and some columns of v. The forward kept the state at the borders of spans; inside a span
// the states are computed again, then the chunks are walked from the last to the first with the gradient of the state.
#pragma once
#include "scan.h"

namespace FV_NAMESPACE {

static inline int64_t backward_floats(const fv_scan& job) {
    const int64_t c = job.chunk, d = up(job.dim, W), e = up(job.width, W);
    return decay_floats(job, true) + 7 * c * d + 4 * c * e + 3 * c * c + 4 * c + d + (job.span / c + 3) * d * e;
}

template <class Decays>
struct Backward {
    static constexpr bool channels = sizeof(Decays) == sizeof(Channels);
    const fv_scan& job;
    const Head head;
    const int64_t n, c, d, e;
    Decays decays;
    float *q, *k, *kt, *q_whole, *k_whole, *u, *w;        // [chunk][d]; u and w become the gradients of q and k
    float *v, *vt, *d_out, *d_v;                          // [chunk][e]
    float *a, *da, *terms;                                // [chunk][chunk]
    float *x, *y, *columns, *d_g, *from_state;
    float *ds, *ds_rows, *square, *states;                // [e][d], but ds_rows and square [d][e]

    static Decays made(float* p, int64_t c, int64_t d) {
        if constexpr (channels) return Channels(p, c, d);
        else return Table(p, c);
    }
    Backward(const fv_scan& job, int64_t task, float* p)
        : job(job), head(job, task), n(job.n), c(job.chunk), d(head.padded_dim()), e(head.padded_width()),
          decays(made(p, c, d)) {
        p += decay_floats(job, true);
        const auto take = [&p](int64_t size) { return (p += size) - size; };
        q = take(c * d), k = take(c * d), kt = take(c * d), q_whole = take(c * d), k_whole = take(c * d);
        u = take(c * d), w = take(c * d);
        v = take(c * e), vt = take(c * e), d_out = take(c * e), d_v = take(c * e);
        a = take(c * c), da = take(c * c), terms = take(c * c);
        x = take(c), y = take(c), columns = take(c), d_g = take(c), from_state = take(d);
        ds = take(d * e), ds_rows = take(d * e), square = take(d * e), states = p;
    }

    void read_state(float* to, const float* from) {
        fill(square, e, d, from, job.dim_v, from ? job.dim : 0, head.width);
        turn(square, e, d, e, to, d);
    }
    // What is left of a state after a chunk.
    void fade_state(float* s) {
        if constexpr (channels) {
            for (int64_t i = 0; i < e * d; i += d)
                for (int64_t j = 0; j < d; j += W)
                    store(s + i + j, load(s + i + j) + load(decays.lost + j) * load(s + i + j));
        } else if (head.g) {
            fade(s, splat(decays.lost), e * d);
        }
    }
    void keys_at_the_end(int64_t count, int64_t rows) {
        if constexpr (channels) decays.ends(k, count, k_whole);
        else
            for (int64_t i = 0; i < rows; ++i)
                times(k_whole + i * d, head.g ? splat(decays.until[i]) : splat(1.0f), k + i * d, d);
    }
    void read(int64_t t, int64_t count, int64_t rows) {
        fill(k, d, rows, head.k + t * job.k.stride_n, job.k.stride_n, count, job.dim);
        fill(v, e, rows, head.v + t * job.v.stride_n, job.v.stride_n, count, head.width);
    }

    void run() {
        bool later = job.d_last;
        read_state(ds, later ? job.d_last + head.state() : nullptr);
        for (int64_t span = (n - 1) / job.span; span >= 0; --span) {
            const int64_t begin = span * job.span, length = n - begin < job.span ? n - begin : job.span;
            const int64_t last = (length - 1) / c;
            read_state(states, head.border(span));
            for (int64_t i = 0; i < last; ++i) {
                float* next = states + (i + 1) * d * e;
                read(begin + i * c, c, c);
                head.prepare(decays, begin + i * c, c, true);
                keys_at_the_end(c, c);
                empty(next, e * d, states + i * d * e, e * d, 1, e * d);
                fade_state(next);
                product<true>(v, e, k_whole, d, e, d, c, next, d, true);
            }
            for (int64_t i = last; i >= 0; --i, later = true) {
                const int64_t t = begin + i * c;
                chunk(t, n - t < c ? n - t : c, states + i * d * e, t > 0 || job.state, later);
            }
        }
        if (!job.d_state) return;
        turn(ds, d, e, d, square, e);
        empty(job.d_state + head.state(), job.dim_v, square, e, job.dim, head.width);
    }

    // The chunk from token t on, with the state before it (`state`: not all zeros) and, in `ds`, the gradient of the state
    // after it (`later`: not all zeros), which becomes that of the state before it.
    void chunk(int64_t t, int64_t count, const float* s, bool state, bool later) {
        const int64_t rows = up(count, ROWS);
        read(t, count, rows);
        fill(q, d, rows, head.q + t * job.q.stride_n, job.q.stride_n, count, job.dim);
        fill(d_out, e, rows, head.d_out + t * job.d_out.stride_n, job.d_out.stride_n, count, head.width);
        head.prepare(decays, t, count, false);
        turn(k, d, rows, d, kt, c);
        turn(v, e, rows, e, vt, c);
        product<false>(d_out, e, vt, c, rows, rows, e, da, c, false, LOWER);
        if constexpr (channels) {
            decays.scores(q, k, kt, count, job.inclusive, a);
            decays.whole_since(count, q_whole);
            mask(rows);
        } else {
            product<false>(q, d, kt, c, rows, rows, d, a, c, false, LOWER);
            decays.weigh(a, rows);
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j <= i && job.d_decay; j += W)
                    store(terms + i * c + j, load(a + i * c + j) * load(da + i * c + j));
                times(q_whole + i * d, head.g ? splat(decays.since[i]) : splat(1.0f), q + i * d, d);
            }
            decays.weigh(da, rows);
        }
        keys_at_the_end(count, rows);

        product<true>(a, c, d_out, e, rows, e, rows, d_v, e, false, AFTER);
        zero(w, rows * d);
        zero(u, rows * d);
        if (later) {
            turn(ds, d, e, d, ds_rows, e);
            product<false>(k_whole, d, ds_rows, e, rows, e, d, d_v, e, true);
            product<false>(v, e, ds, d, rows, d, e, w, d, false);
        }
        if (state) product<false>(d_out, e, s, d, rows, d, e, u, d, false);
        if constexpr (channels) by_channel(t, count, s, state, later);
        else by_token(t, count, rows, s, state, later);

        const int64_t row = head.index * n + t;
        empty(job.d_v + row * job.dim_v + head.first, job.dim_v, d_v, e, count, head.width);
        const int64_t own = (head.part * job.batch * job.heads * n + row) * job.dim;
        empty(job.d_q + own, job.dim, u, d, count, job.dim);
        empty(job.d_k + own, job.dim, w, d, count, job.dim);
        if (t == 0 && !job.d_state) return;
        fade_state(ds);
        product<true>(d_out, e, q_whole, d, e, d, rows, ds, d, true);
    }

    // The gradient of scores counts only where the scores do.
    void mask(int64_t rows) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = i + (job.inclusive ? 1 : 0); j < up(i + 1, ROWS); ++j) da[i * c + j] = 0;
    }

    void by_token(int64_t t, int64_t count, int64_t rows, const float* s, bool state, bool later) {
        if (job.d_decay) {
            for (int64_t i = 0; i < rows; ++i) x[i] = inner(q_whole + i * d, u + i * d, d);
            for (int64_t i = 0; i < rows; ++i) y[i] = inner(k_whole + i * d, w + i * d, d);
            const float z = state && later ? (1 + decays.lost) * inner(s, ds, e * d) : 0;
            decays.gradient(terms, x, y, z, count, d_g, columns);
            const int64_t at = (head.part * job.batch * job.heads + head.index) * n + t;
            for (int64_t i = 0; i < count; ++i) job.d_decay[at + i] = d_g[i];
        }
        if (head.g) scale_rows(u, decays.since, rows, d), scale_rows(w, decays.until, rows, d);
        product<false>(da, c, k, d, rows, d, rows, u, d, true, BEFORE);
        product<true>(da, c, q, d, rows, d, rows, w, d, true, AFTER);
    }

    void by_channel(int64_t t, int64_t count, const float* s, bool state, bool later) {
        const bool through = state && later && job.d_decay;
        for (int64_t j = 0; j < d && through; j += W) {
            vfa sum = vfa{};
            for (int64_t i = j; i < e * d; i += d) sum += load(s + i) * load(ds + i);
            store(from_state + j, sum);
        }
        float* to = job.d_decay ? kt : nullptr;  // the keys are no longer needed in lanes
        decays.gradients(q, k, da, count, state, through ? from_state : nullptr, u, w, to);
        const int64_t at = (head.part * job.batch * job.heads + head.index) * n + t;
        if (to) empty(job.d_decay + at * job.dim, job.dim, to, d, count, job.dim);
    }
};

template <class Decays>
static void scan_backward(const fv_scan& job, int64_t task, float* p) {
    Backward<Decays>(job, task, p).run();
}

}  // namespace FV_NAMESPACE
