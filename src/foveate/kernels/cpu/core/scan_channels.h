// One log decay per token and channel. There is no table of weights; log decays are only ever added, never divided out.
// A chunk consists of blocks. A query reaches a key of an earlier block through (what is left at the query since its
// block began) * (what is left of the key when that block begins): matrix products. Inside a block the key decays from
// token to token.
#pragma once
#include "scan_decay.h"

namespace FV_NAMESPACE {

constexpr int BLOCK = W == 16 ? 16 : 8;

struct Channels {
    int64_t chunk, d;   // tokens, padded channels
    float* g;           // [chunk][d] log decays
    float* factor;      // [chunk][d] exp(g)
    float *since, *until;    // [chunk][d]: since the block began; until it ends
    float *block, *before;   // [blocks + 1][d]: what a block leaves; what all blocks before leave
    float* lost;        // [d] exp - 1 of the whole chunk
    float *q_since, *k_until;  // [chunk][d]: q * since, k * until; then q * all since the chunk began
    float* turned;      // [d][chunk]: k at the border of a block, at last at the end of the chunk
    float* borders;     // k at the borders of blocks 1, 2, .., and of the chunk, one panel after the other

    static int64_t floats(int64_t chunk, int64_t d, bool backward) {
        const int64_t m = chunk / BLOCK;
        return 7 * chunk * d + (2 * m + 3) * d + (backward ? BLOCK * m * (m + 1) / 2 * d : 0);
    }
    Channels(float* p, int64_t chunk, int64_t d) : chunk(chunk), d(d) {
        const int64_t m = chunk / BLOCK, size = chunk * d;
        g = p, factor = g + size, since = factor + size, until = since + size, q_since = until + size;
        k_until = q_since + size, turned = k_until + size, block = turned + size, before = block + (m + 1) * d;
        lost = before + (m + 1) * d, borders = lost + d;
    }
    float* border(int64_t i) const { return borders + BLOCK * i * (i - 1) / 2 * d; }

    // Fills everything that depends on decays alone; rows beyond n do not decay.
    void prepare(const float* from, int64_t stride, int64_t n, int64_t width, bool only_until) {
        const int64_t m = up(n, BLOCK) / BLOCK;
        fill(g, d, m * BLOCK, from, stride, n, width);
        for (int64_t j = 0; j < d; j += W) {
            vfa whole = vfa{}, left = splat(1.0f);
            for (int64_t b = 0; b < m; ++b) {
                const int64_t at = b * BLOCK * d + j;
                vfa sum = vfa{};
                for (int64_t i = BLOCK - 1; i >= 0; --i) {
                    store(until + at + i * d, exp_neg(sum));
                    sum += load(g + at + i * d);
                }
                const vfa leaves = exp_neg(sum);
                store(block + b * d + j, leaves);
                store(before + b * d + j, left);
                left *= leaves, whole += sum;
                if (only_until) continue;
                sum = vfa{};
                for (int64_t i = 0; i < BLOCK; ++i) {
                    const vfa x = load(g + at + i * d);
                    sum += x;
                    store(since + at + i * d, exp_neg(sum));
                    store(factor + at + i * d, exp_neg(x));
                }
            }
            store(lost + j, expm1_neg(whole));
        }
    }

    // to[j] = k[j] at the end of the chunk.
    void ends(const float* k, int64_t n, float* to) const {
        const int64_t m = up(n, BLOCK) / BLOCK;
        for (int64_t j = 0; j < d; j += W) {
            vfa after = splat(1.0f);
            for (int64_t b = m - 1; b >= 0; --b) {
                for (int64_t at = b * BLOCK * d + j; at < (b + 1) * BLOCK * d; at += d)
                    store(to + at, load(k + at) * load(until + at) * after);
                after *= load(block + b * d + j);
            }
        }
        zero(to + m * BLOCK * d, (up(n, ROWS) - m * BLOCK) * d);
    }

    // a[i][j] of the pairs inside a block: the keys lie in lanes and decay as the queries pass. Masked.
    void inside(const float* q, const float* kt, int64_t b, bool inclusive, float* a) const {
        constexpr int NV = BLOCK / W;
        vfa acc[BLOCK][NV];
        for (int i = 0; i < BLOCK; ++i)
            for (int v = 0; v < NV; ++v) acc[i][v] = vfa{};
        const float *from = q + b * BLOCK * d, *decay = factor + b * BLOCK * d;
        for (int64_t c = 0; c < d; ++c) {
            vfa key[NV];
            for (int v = 0; v < NV; ++v) key[v] = load(kt + c * chunk + b * BLOCK + v * W);
#pragma GCC unroll 16
            for (int i = 0; i < BLOCK; ++i) {
                const vfa x = splat(from[i * d + c]), y = splat(decay[i * d + c]);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) {
                    const int on = i - v * W;  // earlier keys
                    if (on > 0) key[v] = on >= W ? key[v] * y : select_bits((1u << on) - 1, key[v] * y, key[v]);
                    acc[i][v] += x * key[v];
                }
            }
        }
        for (int i = 0; i < BLOCK; ++i)
            for (int v = 0; v < NV; ++v) {
                const int on = i + inclusive - v * W;
                const vfa x = on <= 0 ? vfa{} : on >= W ? acc[i][v] : select_bits((1u << on) - 1, acc[i][v], vfa{});
                store(a + (b * BLOCK + i) * chunk + b * BLOCK + v * W, x);
            }
    }

    // The scores of n tokens; `turned` ends as the keys at the end of the chunk, `q_since` as q * all since it began.
    void scores(const float* q, const float* k, const float* kt, int64_t n, bool inclusive, float* a) {
        const int64_t m = up(n, BLOCK) / BLOCK, rows = up(n, ROWS);
        for (int64_t at = 0; at < m * BLOCK * d; at += W) {
            store(q_since + at, load(q + at) * load(since + at));
            store(k_until + at, load(k + at) * load(until + at));
        }
        zero(q_since + m * BLOCK * d, (rows - m * BLOCK) * d);
        zero(k_until + m * BLOCK * d, (rows - m * BLOCK) * d);
        turn(k_until, d, rows, d, turned, chunk);
        for (int64_t i = 0; i < rows; ++i) zero(a + i * chunk, up(i + 1, ROWS));
        for (int64_t b = 0; b < m; ++b) {
            inside(q, kt, b, inclusive, a);
            if (b == 0) continue;
            product<false>(q_since + b * BLOCK * d, d, turned, chunk, BLOCK, b * BLOCK, d, a + b * BLOCK * chunk, chunk, false);
            for (int64_t c = 0; c < d; ++c)
                times(turned + c * chunk, splat(block[b * d + c]), turned + c * chunk, b * BLOCK);
        }
    }

    // q * all that is left since the chunk began, for the products with its state.
    void whole_since(int64_t n, float* to) const {
        const int64_t m = up(n, BLOCK) / BLOCK;
        for (int64_t i = 0; i < m * BLOCK; ++i) {
            const float* left = before + i / BLOCK * d;
            for (int64_t j = 0; j < d; j += W) store(to + i * d + j, load(q_since + i * d + j) * load(left + j));
        }
        zero(to + m * BLOCK * d, (up(n, ROWS) - m * BLOCK) * d);
    }

    // ---- gradients -----------------------------------------------------------------------------------------------

    // Fills `borders`.
    void keep_borders(int64_t n) {
        const int64_t m = up(n, BLOCK) / BLOCK;
        for (int64_t b = 0; b < m; ++b) {
            float* to = border(b + 1);
            for (int64_t i = 0; i < b * BLOCK; ++i)
                for (int64_t j = 0; j < d; j += W)
                    store(to + i * d + j, load(border(b) + i * d + j) * load(block + b * d + j));
            for (int64_t i = b * BLOCK * d; i < (b + 1) * BLOCK * d; i += W) store(to + i, load(k_until + i));
        }
    }

    // Pairs inside a block, given the gradient of their scores (masked): adds to d_q, d_k and, unless NULL, d_g.
    void inside_gradient(const float* q, const float* k, const float* da, int64_t b, float* d_q, float* d_k, float* d_g) const {
        const int64_t row = b * BLOCK * d;
        const float* slopes = da + b * BLOCK * chunk + b * BLOCK;
        for (int64_t c = 0; c < d; c += W) {
            const int64_t at = row + c;
            vfa left[BLOCK], keys[BLOCK];
            for (int j = 0; j < BLOCK; ++j) left[j] = splat(1.0f), keys[j] = vfa{};
            for (int i = 0; i < BLOCK; ++i) {
                const vfa query = load(q + at + i * d), y = load(factor + at + i * d);
                vfa sum = vfa{}, passing = vfa{};
                for (int j = 0; j < i; ++j) {
                    left[j] *= y;
                    const vfa x = splat(slopes[i * chunk + j]) * left[j], z = x * load(k + at + j * d);
                    sum += z, keys[j] += x * query, passing += z * query;
                    if (d_g) store(d_g + at + (j + 1) * d, load(d_g + at + (j + 1) * d) + passing);
                }
                const vfa own = splat(slopes[i * chunk + i]);
                store(d_q + at + i * d, load(d_q + at + i * d) + sum + own * load(k + at + i * d));
                keys[i] += own * query;
            }
            for (int j = 0; j < BLOCK; ++j) store(d_k + at + j * d, load(d_k + at + j * d) + keys[j]);
        }
    }

    // From u = d_out S^T (NULL: no state) and w = v dS^T, whose places they take, to the gradients of q and k; d_g, unless
    // NULL, receives those of the log decays but what passes through the whole chunk. `from_state` [d]: sum S dS, or NULL.
    void gradients(const float* q, const float* k, const float* da, int64_t n, bool state, const float* from_state, float* u,
                   float* w, float* d_g) {
        const int64_t m = up(n, BLOCK) / BLOCK;
        keep_borders(n);
        if (d_g) zero(d_g, up(n, ROWS) * d);
        // What passes over the blocks from b on: out of the state into later queries and the state after the chunk.
        float* passing = before + m * d;  // nobody needs what all blocks leave
        for (int64_t j = 0; j < d; j += W)
            store(passing + j, from_state ? load(from_state + j) * (splat(1.0f) + load(lost + j)) : vfa{});
        for (int64_t b = m - 1; b >= 0; --b) {
            const int64_t row = b * BLOCK * d;
            for (int64_t j = 0; j < d; j += W) {
                const vfa leaves = load(block + b * d + j), left = load(before + b * d + j);
                vfa over = load(passing + j), later = over;
                for (int64_t i = 0; i < b * BLOCK; ++i) {  // pairs over this block
                    const vfa x = load(w + i * d + j) * leaves;
                    over += x * load(border(b) + i * d + j);
                    store(w + i * d + j, x);
                }
                for (int64_t at = row + j; at < row + BLOCK * d; at += d) {
                    const vfa x = state ? load(u + at) * left : vfa{};
                    later += x * load(q_since + at);
                    store(u + at, x);
                    store(w + at, load(w + at) * load(until + at));
                }
                store(passing + j, later);
                if (d_g)
                    for (int64_t at = row + j; at < row + BLOCK * d; at += d) store(d_g + at, over);
            }
            if (b > 0) {
                product<false>(da + b * BLOCK * chunk, chunk, border(b), d, BLOCK, d, b * BLOCK, u + row, d, true);
                product<true>(da + b * BLOCK * chunk, chunk, q_since + row, d, b * BLOCK, d, BLOCK, w, d, true);
            }
            for (int64_t j = 0; j < d; j += W) {
                vfa sum = vfa{};
                for (int64_t at = row + (BLOCK - 1) * d + j; at >= row; at -= d) {
                    const vfa x = load(u + at) * load(since + at);
                    store(u + at, x);
                    sum += x * load(q + at);
                    if (d_g) store(d_g + at, load(d_g + at) + sum);
                }
                sum = vfa{};
                for (int64_t at = row + j; d_g && at < row + BLOCK * d; at += d) {
                    store(d_g + at, load(d_g + at) + sum);
                    sum += load(w + at) * load(k + at);
                }
            }
            inside_gradient(q, k, da, b, u, w, d_g);
        }
    }
};

}  // namespace FV_NAMESPACE
