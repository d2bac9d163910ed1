// What log decays leave: one decay per token (or none), as tables of a chunk. See kernels/scan/chunk.py for the sums.
#pragma once
#include "panels.h"

namespace FV_NAMESPACE {

constexpr double NOTHING = -800;  // leaves nothing in double precision either; finite, so that sums have differences

// exp(x) - 1 for x <= 0, with all its digits near 0.
static inline vfa expm1_neg(vfa x) {
    vfa p = splat(1.0f / 40320);
    p = p * x + splat(1.0f / 5040);
    p = p * x + splat(1.0f / 720);
    p = p * x + splat(1.0f / 120);
    p = p * x + splat(1.0f / 24);
    p = p * x + splat(1.0f / 6);
    p = p * x + splat(0.5f);
    p = p * x + splat(1.0f);
    return x > splat(-0.5f) ? p * x : exp_neg(x) - splat(1.0f);
}

struct Table {
    float* weights;         // [chunk][chunk]: what is left at token i of the pair of token j; 0 above the diagonal
    float *since, *until;   // of the state before the chunk at token i; of the pair of token j after the chunk
    float *high, *low;      // running sums, their float and what it lacks
    float lost;             // exp - 1 of the whole chunk
    int64_t chunk, ready;

    static int64_t floats(int64_t chunk) { return chunk * chunk + 4 * chunk; }
    Table(float* p, int64_t chunk)
        : weights(p), since(p + chunk * chunk), until(since + chunk), high(until + chunk), low(high + chunk), lost(0),
          chunk(chunk), ready(0) {}

    // n tokens; `g` NULL: no decay; stride 0: always the same, computed once.
    void prepare(const float* g, int64_t stride, int64_t n, bool inclusive) {
        if ((!g || stride == 0) && ready == n) return;
        ready = n;
        const int64_t rows = up(n, ROWS);
        double sum = 0;
        for (int64_t i = 0; i < rows; ++i) {
            if (g && i < n) sum += g[i * stride] < NOTHING ? NOTHING : g[i * stride];
            high[i] = (float)sum, low[i] = (float)(sum - high[i]);
        }
        const vfa last = splat(high[n - 1]), last_low = splat(low[n - 1]);
        for (int64_t i = 0; i < rows; i += W) {
            store(since + i, exp_neg(load(high + i)));
            store(until + i, exp_neg((last - load(high + i)) + (last_low - load(low + i))));
        }
        lost = expm1_neg(last)[0];
        for (int64_t i = 0; i < rows; ++i) {
            float* row = weights + i * chunk;
            const int64_t seen = i + inclusive;
            const vfa own = splat(high[i]), own_low = splat(low[i]);
            for (int64_t j = 0; j < up(i + 1, ROWS); j += W) {
                const int64_t n_on = seen - j;
                if (n_on <= 0) {
                    store(row + j, vfa{});
                    continue;
                }
                const vfa sum = (own - load(high + j)) + (own_low - load(low + j));  // > 0 in lanes above the diagonal
                const vfa x = g ? exp_neg(sum < vfa{} ? sum : vfa{}) : splat(1.0f);
                store(row + j, n_on >= W ? x : select_bits((1u << n_on) - 1, x, vfa{}));
            }
        }
    }

    // Products of a lower triangle with the weights.
    void weigh(float* a, int64_t rows) const {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < up(i + 1, ROWS); j += W)
                store(a + i * chunk + j, load(a + i * chunk + j) * load(weights + i * chunk + j));
    }

    // Gradients of the log decays: to[t] = the sum over all pairs j < t <= i of terms[i][j], of x[i], of y[j], and z.
    // Every sum is of terms that decay over t: no differences of large numbers.
    void gradient(const float* terms, const float* x, const float* y, float z, int64_t n, float* to, float* columns) const {
        zero(columns, up(n, ROWS));
        float since_t = 0, before = 0;
        for (int64_t t = n - 1; t >= 0; --t) {
            vfa sum = vfa{};
            for (int64_t j = 0; j < t; j += W) {
                const vfa column = load(columns + j) + load(terms + t * chunk + j);
                store(columns + j, column);
                sum += j + W <= t ? column : select_bits((1u << (t - j)) - 1, column, vfa{});
            }
            since_t += x[t];
            to[t] = total(sum) + since_t + z;
        }
        for (int64_t t = 0; t < n; ++t) to[t] += before, before += y[t];
    }
};

}  // namespace FV_NAMESPACE
